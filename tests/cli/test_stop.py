"""Runs that are asked to stop, and runs that are not asked."""

from __future__ import annotations

import fcntl
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.cli.helpers import (
    TORCHRUN,
    TRAIN,
    checkpoints,
    disttrain,
    environment,
    finish,
    losses,
    processes_of,
    rows,
    started,
    status,
    wait_for,
    wait_for_a_step,
)

RANK_CODE = Path(__file__).with_name("rank_code.py")
ENDLESS = "train.steps=100000"
FAILED = 1
PREEMPTED = 75


def stopped_step(folder: Path) -> int:
    """The step of a run that was stopped in order: status.json, the newest checkpoint and the metrics agree on it."""
    left = status(folder)
    assert left["state"] == "preempted"
    assert checkpoints(folder)[-1] == f"step-{left['step']:08d}"
    assert rows(folder)[-1]["step"] == left["step"]
    return left["step"]


def check_equal(folder: Path, finished_folder: Path) -> None:
    """Every step once, and up to step 40 with the losses of the run that nobody stopped."""
    mine = losses(folder)
    assert [row["step"] for row in rows(folder) if "loss" in row] == list(range(1, len(mine) + 1))
    assert {step: loss for step, loss in mine.items() if step <= 40} == losses(finished_folder)


def finish_run(folder: Path, config: Path, finished_folder: Path) -> None:
    """Start it again, to 40 steps or a little more than it has, and compare."""
    steps = max(40, status(folder)["step"] + 2)
    ended = disttrain("train", config, "--nproc", 2, f"run.dir={folder}", f"train.steps={steps}")
    assert ended.code == 0, ended
    assert status(folder) == {"state": "completed", "step": steps}
    check_equal(folder, finished_folder)


def test_stop_on_request(config: Path, finished_folder: Path, tmp_path: Path) -> None:
    """SIGTERM; then again from the run folder, and two signals at once; then to the end."""
    folder = tmp_path / "run"
    with started(*TRAIN, config, "--nproc", 2, f"run.dir={folder}", ENDLESS) as process:
        wait_for_a_step(folder, process)
        process.send_signal(signal.SIGTERM)
        ended = finish(process)
    assert (ended.code, ended.err) == (PREEMPTED, "")
    first = stopped_step(folder)
    assert f"step {first}, {folder}" in ended.out
    assert not processes_of(folder)

    with started(*TRAIN, folder) as process:
        wait_for_a_step(folder, process)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        ended = finish(process)
    assert (ended.code, ended.err) == (PREEMPTED, "")
    assert f"(step {first})" in ended.out
    assert stopped_step(folder) > first
    assert not processes_of(folder)
    finish_run(folder, config, finished_folder)


def test_stop_before_the_ranks_are_up(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = (*TRAIN, config, f"run.dir={folder}", ENDLESS)
    with started(*command) as process:
        wait_for(lambda: (folder / ".lock").exists(), process)
        # Data and checkpoints are looked at without a handler: a stop signal kills as usual.
        wait_for(lambda: signal.SIGTERM in caught_signals(process.pid), process)
        process.send_signal(signal.SIGTERM)
        ended = finish(process)
    assert (ended.code, ended.err) == (FAILED, "")
    assert "before there was a checkpoint" in ended.out
    assert status(folder) == {"state": "failed", "step": 0}


def caught_signals(pid: int) -> set[int]:
    """The signals that a process has a handler for, as Linux shows them."""
    mask = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    assert mask
    return {number for number in range(1, 32) if int(mask[1], 16) >> (number - 1) & 1}


def test_deaths(config: Path, finished_folder: Path, tmp_path: Path) -> None:
    """A rank is killed, and nobody may start it again; then, after a start by hand, the parent; then to the end."""
    folder = tmp_path / "run"
    overrides = (f"run.dir={folder}", ENDLESS, "checkpoint.every=2", "resilience.max_restarts=0")
    with started(*TRAIN, config, "--nproc", 2, *overrides) as process:
        wait_for(lambda: bool(checkpoints(folder)), process)
        psutil.Process(process.pid).children()[1].kill()
        ended = finish(process)
    assert ended.code == FAILED
    assert re.search(r"rank 1 on \S+ \(process \d+\) was killed by SIGKILL, after step \d+ at least", ended.err)
    assert status(folder)["state"] == "failed"
    assert not processes_of(folder)

    with started(*TRAIN, config, "--nproc", 2, *overrides) as process:
        wait_for_a_step(folder, process)
        process.kill()
        process.wait()
        # The ranks notice, leave a checkpoint, and let go of the run folder.
        with (folder / ".lock").open() as lock:
            wait_for_the_lock(lock.fileno())
    stopped_step(folder)
    assert not processes_of(folder)
    finish_run(folder, config, finished_folder)


def wait_for_the_lock(descriptor: int) -> None:
    """Ends by itself with the test's own time limit."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def test_stop_under_torchrun(config: Path, finished_folder: Path, tmp_path: Path) -> None:
    """An agent restarts whatever exits 75, so the ranks exit 0 and status.json says what happened."""
    folder = tmp_path / "run"
    env = environment(CODES=str(tmp_path))
    with started(*TORCHRUN, RANK_CODE, "train", config, f"run.dir={folder}", ENDLESS, env=env) as process:
        wait_for_a_step(folder, process)
        process.send_signal(signal.SIGTERM)
        finish(process)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["0", "0"]
    stopped_step(folder)
    assert not processes_of(folder)
    finish_run(folder, config, finished_folder)


def test_stop_of_ranks_without_an_agent(config: Path, tmp_path: Path) -> None:
    """What srun starts: one signal is enough for all ranks, and they exit 75 themselves."""
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with ExitStack() as stack:
        ranks: list[subprocess.Popen[str]] = []
        for rank in ("0", "1"):
            env = environment(RANK=rank, LOCAL_RANK=rank, **common)
            command = (sys.executable, "-m", "disttrain", "train", config, f"run.dir={folder}", ENDLESS)
            ranks.append(stack.enter_context(started(*command, env=env)))
        wait_for_a_step(folder, ranks[0])
        ranks[1].send_signal(signal.SIGTERM)
        ended = [finish(process) for process in ranks]
    assert [(one.code, one.err) for one in ended] == [(PREEMPTED, "")] * 2
    assert ended[1].out == ""
    stopped_step(folder)
