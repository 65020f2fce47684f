"""Running the commands as a user does: in processes of their own, each with a timeout, none left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from disttrain.testing.commands import Command

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120.0
TORCH_WAS_IMPORTED = 99
NO_TORCH = "no_torch"
"""Part of the path in which the fixture of that name puts a torch that ends the process."""
TRAIN = (sys.executable, "-m", "disttrain", "train")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def environment(**variables: str) -> dict[str, str]:
    """Ours, with this checkout importable and without what a launcher or a terminal would have set."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    # On a busy machine the threads of one process would burn the cores that its tiny steps need.
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "COLUMNS": "200"}
    return inherited | fixed | variables


@contextmanager
def started(*command: object, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A running command; what is left of it and its children at the end is killed."""
    process = subprocess.Popen(
        [str(part) for part in command],
        env=dict(env or environment()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        # The group outlives its leader: ranks whose parent is gone are still in it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    return Ended(process.returncode, out, err)


def run(*command: object, env: Mapping[str, str] | None = None) -> Ended:
    with started(*command, env=env) as process:
        return finish(process)


def disttrain(*arguments: object, env: Mapping[str, str] | None = None) -> Ended:
    """`python -m disttrain`, in a fork of a process that has imported torch, unless `env` is made of `no_torch`."""
    env = env or environment()
    if NO_TORCH in env["PYTHONPATH"]:
        return run(sys.executable, "-m", "disttrain", *arguments, env=env)
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        command = Command([str(argument) for argument in arguments], Path(folder), env)
        try:
            out, err = command.communicate(TIMEOUT_SECONDS)
        finally:
            command.end()
        return Ended(command.returncode or 0, out, err)


def refused(ended: Ended) -> list[str]:
    """The lines of a refusal: exit code 2 (not that of `no_torch`), and no traceback."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.out + ended.err
    return ended.err.splitlines()


def status(folder: Path) -> dict[str, Any]:
    """State and step; where the time went besides is `full_status`."""
    return {key: full_status(folder)[key] for key in ("state", "step")}


def full_status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("checkpoints/step-????????/manifest.json"))


def damage(checkpoint: Path) -> None:
    """Flip one bit in the middle of a data file."""
    file = min(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until `condition()` holds while `process` runs."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def wait_for_a_step(folder: Path, process: subprocess.Popen[str]) -> None:
    metrics = folder / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > size, process)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that have the run folder in their command line, which forked ranks share."""
    found = psutil.process_iter(["cmdline", "status"])
    alive = [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]
    return [process for process in alive if any(str(folder) in part for part in process.info["cmdline"] or ())]
