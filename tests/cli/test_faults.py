"""Ranks that die or hang are started again by themselves; requests to stop of every kind."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from disttrain.testing.commands import Command, wait_until
from tests.cli.helpers import (
    TIMEOUT_SECONDS,
    TRAIN,
    checkpoints,
    disttrain,
    environment,
    events,
    finish,
    full_status,
    losses,
    processes_of,
    refused,
    started,
    status,
    wait_for,
    wait_for_a_step,
)
from tests.cli.test_stop import ENDLESS, PREEMPTED, stopped_step

FEW = ("checkpoint.every=10", "train.steps=80", "monitor.evaluate_every=80")


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert disttrain("train", config, "--nproc", 2, f"run.dir={folder}", *FEW).code == 0
    return losses(folder)


def kinds(folder: Path) -> list[str]:
    return [event["kind"] for event in events(folder) if event["kind"] != "checkpoint"]


@pytest.mark.parametrize("victims", [[0], [0, 1]])
def test_killed_ranks_are_started_again(
    config: Path, undisturbed: dict[int, float], tmp_path: Path, victims: list[int]
) -> None:
    folder = tmp_path / "run"
    with started(*TRAIN, config, "--nproc", 2, f"run.dir={folder}", *FEW) as process:
        wait_for(lambda: len(checkpoints(folder)) > 1, process)
        ranks = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        for victim in victims:
            ranks[victim].kill()
        ended = finish(process)
    assert ended.code == 0, ended
    assert re.search(
        rf"error: rank {victims[0]} on \S+ \(process \d+\) was killed by SIGKILL, after step \d+", ended.err
    )
    assert "Traceback" not in ended.err
    assert ended.out.count("starting again from step") == 1
    assert losses(folder) == undisturbed  # to the bit
    # Where other work fills the cores a rank may well be slow, which is a warning.
    assert [kind for kind in kinds(folder) if kind not in ("failed", "warning")] == [
        "start",
        "lost_rank",
        "restart",
        "resume",
        "completed",
    ]
    assert full_status(folder)["lost_seconds"]["recomputed"] > 0
    assert not processes_of(folder)


def test_a_stopped_rank_is_named_and_started_again(config: Path, undisturbed: dict[int, float], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = (*TRAIN, config, "--nproc", 2, f"run.dir={folder}", *FEW, "resilience.hang_seconds=2")
    with started(*run) as process:
        wait_for(lambda: len(checkpoints(folder)) > 1, process)
        ranks = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        ranks[1].suspend()
        ended = finish(process)
    assert ended.code == 0, ended
    assert "rank 1 of 2 does not answer at all (stopped, or out of Python's reach)" in ended.err
    where = json.loads((folder / "hang/rank-0.json").read_text())
    assert (where["rank"], where["phase"]) == (0, "a step")
    assert where["stack"]
    assert where["collective"][0] > 0
    assert losses(folder) == undisturbed
    assert "hang" in kinds(folder)
    assert not processes_of(folder)


LOOP = """
import os, time
from pathlib import Path

def update(gradient, state, **settings):
    flag = Path(__file__).with_name("hang")
    if os.environ.get("RANK") == "1" and flag.exists():
        flag.unlink()
        while True:
            pass
    return gradient
"""


def test_an_endless_loop_is_named_with_its_place(config: Path, tmp_path: Path) -> None:
    """In a function of the user's own, which rank 1 never leaves; the other rank waits in a collective."""
    (tmp_path / "mine.py").write_text(LOOP)
    folder = tmp_path / "run"
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    groups = (
        "optim.groups=[{name='matrices',match=['role:matrices'],algorithm='mine:update',lr=1e-4},"
        "{name='rest',match=['.*'],algorithm='adamw'}]"
    )
    run = (*TRAIN, config, "--nproc", 2, f"run.dir={folder}", *FEW, "resilience.hang_seconds=2", groups)
    with started(*run, env=env) as process:
        wait_for(lambda: len(checkpoints(folder)) > 1, process)
        (tmp_path / "hang").touch()
        ended = finish(process)
    assert ended.code == 0, ended
    (hang,) = [event for event in events(folder) if event["kind"] == "hang"]
    assert re.search(
        r"rank 1 on \S+ \(process \d+\) has entered \d+ collectives, the others \d+; it is in ", hang["text"]
    )
    assert "mine.py" in hang["text"]


@contextmanager
def with_injection(folder: Path, *command: object) -> Iterator[Command]:
    """A command whose ranks do what files in `folder` tell them; see `disttrain.testing.injection`."""
    arguments, environ = [str(part) for part in command], environment(FAULTS=str(folder))
    running = Command(arguments, folder, environ, ("disttrain.testing.injection:install",))
    try:
        yield running
    finally:
        running.end()


def completed(command: Command) -> tuple[str, str]:
    """What it printed, once it has come to its end without a traceback."""
    out, err = command.communicate(TIMEOUT_SECONDS)
    assert command.returncode == 0, (out, err)
    assert "Traceback" not in err
    return out, err


def test_a_rank_that_hangs_before_the_meeting_is_named_and_all_start_again(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "absent-1").touch()
    few = ("train.steps=2", "resilience.arrival_timeout_seconds=2")
    with with_injection(tmp_path, "train", config, "--nproc", 2, f"run.dir={folder}", *few) as command:
        out, err = completed(command)
    assert re.search(r"error: rank 1 \(\S+\) of 2 has not arrived after 2 s", err)
    assert out.count("starting again from the beginning") == 1
    assert status(folder) == {"state": "completed", "step": 2}


def test_a_rank_that_hangs_in_a_save_is_named_before_the_collective_gives_up(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "unsaved-1").touch()
    few = ("train.steps=4", "checkpoint.every=2", "resilience.collective_timeout_seconds=5")
    with with_injection(tmp_path, "train", config, "--nproc", 2, f"run.dir={folder}", *few) as command:
        completed(command)
    (hang,) = [event["text"] for event in events(folder) if event["kind"] == "hang"]
    assert re.search(r"no progress in step 2 for \d+ s: rank 1 on \S+ \(process \d+\) has entered ", hang)
    assert status(folder) == {"state": "completed", "step": 4}


def test_flipped_bits_start_the_run_again(config: Path, undisturbed: dict[int, float], tmp_path: Path) -> None:
    """A weight of one ddp rank changes by itself: the run ends, and goes on from the last checkpoint."""
    folder = tmp_path / "run"
    run = ("train", config, "--nproc", 2, f"run.dir={folder}", *FEW, "parallel.strategy=ddp")
    with with_injection(tmp_path, *run, "resilience.compare_replicas_every=5") as command:
        assert wait_until(lambda: len(checkpoints(folder)) > 1, TIMEOUT_SECONDS)
        (tmp_path / "flip-1").touch()
        out, err = completed(command)
    assert re.search(r"error: step \d+: weights that should be equal are not\. rank 0 on \S+, rank 1 on \S+: ", err)
    assert out.count("starting again from step") == 1
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-5)  # of fsdp
    assert not (tmp_path / "flip-1").exists()


def test_the_budget_of_restarts_ends(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = (*TRAIN, config, "--nproc", 2, f"run.dir={folder}", ENDLESS, "checkpoint.every=100000")
    with started(*run, "resilience.max_restarts=1") as process:
        for _ in range(2):
            wait_for_a_step(folder, process)
            psutil.Process(process.pid).children()[0].kill()
            time.sleep(0.5)
        ended = finish(process)
    assert ended.code == 1
    assert ended.out.count("starting again from the beginning (1 of 1 restarts without a new checkpoint)") == 1
    assert status(folder) == {"state": "failed", "step": 0}
    assert not processes_of(folder)


def test_numbers_gone_bad_are_no_reason_to_start_again(config: Path, tmp_path: Path) -> None:
    run = ("--nproc", 2, f"run.dir={tmp_path}", "optim.lr=1e38", "schedule.warmup_steps=0")
    ended = disttrain("train", config, *run)
    assert ended.code == 1
    assert "starting again" not in ended.out
    assert "there is no checkpoint from before step" in ended.err


@pytest.mark.parametrize("way", ["USR1", "file", "limit"])
def test_every_way_to_ask_for_a_stop(config: Path, finished_folder: Path, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "run"
    end = {"SLURM_JOB_END_TIME": str(time.time() + 9)} if way == "limit" else {}
    run = (*TRAIN, config, "--nproc", 2, f"run.dir={folder}", ENDLESS, "resilience.stop_before_limit_seconds=3")
    with started(*run, env=environment(**end)) as process:
        wait_for_a_step(folder, process)
        if way == "USR1":
            process.send_signal(signal.SIGUSR1)
        elif way == "file":
            (folder / "STOP").touch()
        ended = finish(process)
    assert (ended.code, ended.err) == (PREEMPTED, "")
    stopped_step(folder)
    (stop,) = [event for event in events(folder) if event["kind"] == "stop"]
    reason = {"USR1": "another rank was asked|SIGTERM", "file": "STOP is there", "limit": "time limit comes near"}[way]
    assert re.search(reason, stop["text"])
    assert not (folder / "STOP").exists()
    expected = losses(finished_folder)
    assert {step: loss for step, loss in losses(folder).items() if step <= 40}.items() <= expected.items()


def test_a_stop_file_from_before_is_told(config: Path, tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    ended = disttrain("train", config, "--nproc", 1, f"run.dir={tmp_path}", "train.steps=5")
    assert ended.code == 0, ended
    assert f"warning: {tmp_path / 'STOP'} was left from before and is taken away" in ended.out
    assert "warning" in kinds(tmp_path)
    assert status(tmp_path) == {"state": "completed", "step": 5}


def test_a_patience_shorter_than_a_step_is_told(config: Path, tmp_path: Path) -> None:
    run = ("--nproc", 1, f"run.dir={tmp_path}", "train.steps=5", "resilience.hang_seconds=1e-4")
    ended = disttrain("train", config, *run)
    assert ended.code == 0, ended
    (line,) = [line for line in ended.out.splitlines() if "hang_seconds" in line]
    assert line.startswith("warning: resilience.hang_seconds = 0.0001 is shorter than a step, which took ")


def test_refused(config: Path, tmp_path: Path, no_torch: dict[str, str]) -> None:
    run = ("train", config, f"run.dir={tmp_path}")
    for setting in ("max_restarts=-1", "hang_seconds=0", "anomaly.max_rollbacks=-1", "anomaly.warmup_steps=200"):
        (line,) = refused(disttrain(*run, f"resilience.{setting}", env=no_torch))
        assert f"resilience.{setting.split('=')[0].split('.')[0]}" in line or "warmup_steps" in line
    assert not list(tmp_path.iterdir())


SLOW = """
import os, time

ended = None

def update(gradient, state, **settings):
    global ended
    if os.environ.get("RANK") == "1":
        now = time.thread_time()
        if ended is not None:
            while time.thread_time() < now + 2 * (now - ended):
                pass
        ended = time.thread_time()
    return gradient
"""


def test_a_slow_rank_is_named(config: Path, tmp_path: Path) -> None:
    """Rank 1 takes three times as long for all that it does itself."""
    (tmp_path / "dawdling.py").write_text(SLOW)
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    groups = (
        "optim.groups=[{name='matrices',match=['role:matrices'],algorithm='dawdling:update',lr=1e-4},"
        "{name='rest',match=['.*'],algorithm='adamw'}]"
    )
    folder = tmp_path / "run"
    ended = disttrain(
        "train", config, "--nproc", 2, f"run.dir={folder}", groups, "resilience.slow_rank_factor=2", env=env
    )
    assert ended.code == 0, ended
    named = [event["text"] for event in events(folder) if "is slow" in event["text"]]
    assert re.match(r"step \d+: rank 1 is slow: its own work takes \d\.\d\d times as long as the others'", named[0])
    assert not [text for text in named if "rank 0" in text]
