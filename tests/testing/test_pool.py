"""The rank pool: results, errors, hangs, deaths, and that nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from disttrain.testing import JobError, RankPool

JOBS = "tests.testing.pool_jobs"
ROOT = Path(__file__).parents[2]


@contextmanager
def well_before_the_timeout() -> Iterator[None]:
    """A job may take 60 s by default: what ends within half of it was not ended by the timeout."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_results_come_in_the_order_of_the_ranks(pool: RankPool, world: int) -> None:
    total = world * (world - 1) / 2
    assert pool.run(f"{JOBS}:rank_sum", world=world) == [(rank, total) for rank in range(world)]


def test_tensors_travel_by_value(pool: RankPool) -> None:
    tensor = torch.arange(3.0)
    results = pool.run(f"{JOBS}:scaled", world=2, tensor=tensor, factors={"by": torch.tensor(2.0)})
    assert torch.equal(results[1], torch.tensor([0.0, 2.0, 4.0]))
    assert not results[1].is_shared()
    assert torch.equal(tensor, torch.arange(3.0))


def test_workers_are_kept_and_have_one_thread(pool: RankPool) -> None:
    first = pool.run(f"{JOBS}:threads_and_pid", world=2)
    assert [threads for threads, _ in first] == [1, 1]
    assert pool.run(f"{JOBS}:threads_and_pid", world=2) == first


def test_a_job_does_not_see_what_another_left(pool: RankPool) -> None:
    before = pool.run(f"{JOBS}:see_state", world=2)
    pool.run(f"{JOBS}:leave_state", world=2)
    assert pool.run(f"{JOBS}:see_state", world=2) == before
    assert before[0][1] != before[1][1]


def test_a_rank_may_finish_long_before_its_peer(pool: RankPool) -> None:
    assert pool.run(f"{JOBS}:return_early", world=2) == [None, None]


def test_a_job_may_end_its_group(pool: RankPool) -> None:
    before = pool.run(f"{JOBS}:threads_and_pid", world=2)
    pool.run(f"{JOBS}:end_group", world=2)
    assert pool.run(f"{JOBS}:threads_and_pid", world=2) == before


def test_a_job_may_have_child_processes(pool: RankPool) -> None:
    assert pool.run(f"{JOBS}:load_data", world=1) == [45]


@pytest.mark.parametrize("where", ["before_collective", "between_collectives", "in_fsdp_forward"])
def test_an_error_names_its_rank_and_frees_the_others(pool: RankPool, where: str) -> None:
    with well_before_the_timeout(), pytest.raises(JobError) as caught:
        pool.run(f"{JOBS}:raise_{where}", world=4)
    assert list(caught.value.failures) == [1]
    assert f'raise ValueError("bad input {where.split("_")[0]} the' in caught.value.failures[1]
    assert caught.value.failures[1] in f"{caught.value}\n"
    assert pool.run(f"{JOBS}:rank_sum", world=4) == [(rank, 6.0) for rank in range(4)]


def test_the_first_error_comes_first(pool: RankPool) -> None:
    with pytest.raises(JobError, match=r"failed on ranks 2, 1, 0 of 3") as caught:
        pool.run(f"{JOBS}:raise_everywhere", world=3)
    assert list(caught.value.failures) == [2, 1, 0]


def test_a_hang_ends_at_the_timeout_with_stacks(pool: RankPool) -> None:
    with well_before_the_timeout(), pytest.raises(JobError, match=r"no result within 2 s on ranks 0, 1 of 2") as caught:
        pool.run(f"{JOBS}:hang", world=2, timeout_seconds=2)
    assert "in _sleep_for_long" in caught.value.failures[1]
    assert "in all_reduce" in caught.value.failures[0]
    assert "_end_with_parent" not in str(caught.value)


def test_a_killed_rank_is_named_first_with_its_signal(pool: RankPool) -> None:
    with well_before_the_timeout(), pytest.raises(JobError) as caught:
        pool.run(f"{JOBS}:die", world=4)
    assert next(iter(caught.value.failures)) == 2
    assert "killed by SIGKILL" in caught.value.failures[2]


def test_an_exit_code_is_named_even_if_a_child_holds_the_pipe(pool: RankPool) -> None:
    with well_before_the_timeout(), pytest.raises(JobError) as caught:
        pool.run(f"{JOBS}:leave_with_child", world=2, seconds=1)
    assert "exit code 7" in caught.value.failures[0]


def test_workers_that_died_between_jobs_are_replaced(pool: RankPool) -> None:
    (_, pid), _ = pool.run(f"{JOBS}:threads_and_pid", world=2)
    process = psutil.Process(pid)
    process.kill()
    psutil.wait_procs([process], timeout=10)
    assert pool.run(f"{JOBS}:rank_sum", world=2) == [(0, 1.0), (1, 1.0)]


@pytest.mark.parametrize("name", ["return_function", "return_group"])
def test_a_result_that_cannot_travel_has_a_remedy(pool: RankPool, name: str) -> None:
    with pytest.raises(JobError, match=r"cannot be pickled.*: return numbers"):
        pool.run(f"{JOBS}:{name}", world=1)


@pytest.mark.parametrize(
    ("job", "text"), [(f"{JOBS}:nothing", "no attribute 'nothing'"), ("nowhere:job", "No module named 'nowhere'")]
)
def test_an_unknown_job_is_named(pool: RankPool, job: str, text: str) -> None:
    with pytest.raises(JobError, match=text):
        pool.run(job, world=1)


@pytest.mark.parametrize(("job", "world", "text"), [("no_colon", 1, "no_colon"), ("a:b", 0, "= 0"), ("a:b", 9, "= 9")])
def test_bad_arguments_are_refused(pool: RankPool, job: str, world: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pool.run(job, world=world)


def test_a_closed_pool_leaves_nothing_and_says_so() -> None:
    pool = RankPool()
    pids = [pid for _, pid in pool.run(f"{JOBS}:threads_and_pid", world=2)]
    pool.close()
    pool.close()
    assert not [pid for pid in pids if _is_running(pid)]
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(f"{JOBS}:rank_sum", world=1)


# Without a guard for `__main__`, and without closing the pool.
SCRIPT = f"""
from disttrain.testing import RankPool
pool = RankPool()
pool.run("{JOBS}:rank_sum", world=2)
print("started", flush=True)
if input() == "hang":
    pool.run("{JOBS}:hang", world=2)
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_nothing_is_left_when_the_parent_ends(tmp_path: Path, end: str) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, **pipes) as parent:  # type: ignore[call-overload]
        assert parent.stdout.readline() == "started\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 3  # the fork server and two ranks
        assert list(tmp_path.glob("ranks-*"))
        parent.stdin.write("hang\n" if end == "kill" else "exit\n")
        parent.stdin.flush()
        if end == "kill":
            assert parent.stdout.readline() == "rank 0 waits\n"
            parent.send_signal(signal.SIGKILL)
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if _is_running(child.pid)]
    assert not list(tmp_path.glob("ranks-*"))
    # After a kill, Python's own folder with the fork server's socket stays.
    assert end == "kill" or not list(tmp_path.glob("pymp-*"))


def _is_running(pid: int) -> bool:
    """Whether a process lives: where nobody reaps orphans, dead ones stay as zombies."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
