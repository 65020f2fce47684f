"""Saves and loads to disturb: states whose bits tell run and step, ranks that save until they are killed, a judge."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.manager import CheckpointManager
from disttrain.checkpoint.storage import step_name
from disttrain.errors import UserError

RUN, OTHER_RUN = "run-a", "run-b"
OLDER, NEWER = 1, 2
SMALL_ROWS, LARGE_ROWS = 80, 2048
"""About 100 kB, and more than 1 MB for each of two ranks."""
FELL_BACK, TOOK_NEWER = "fell back", "took the newer one"
_KILLED_ROWS = 8192


@lru_cache(maxsize=8)
def whole_state(step: int, rows: int, run_id: str = RUN) -> dict[str, Tensor]:
    """Bits that only this step of this run has: matrices that ranks cut by rows, and tensors that each has whole."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{run_id} {step}".encode()))
    return {
        "model.weight": torch.randn(rows, 128, generator=generator),
        "model.half": torch.randn(rows, 32, generator=generator).bfloat16(),
        "optim.weight.exp_avg": torch.randn(rows, 128, generator=generator),
        "model.ids": torch.randint(2**62, (33,), generator=generator),
        "model.mask": torch.randint(2, (35,), generator=generator).bool(),
        "optim.weight.step": torch.tensor(float(step)),
    }


def cut(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's rows of every matrix, as DTensors; without a process group all of them."""
    if not dist.is_initialized():
        return state
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    return {
        name: DTensor.from_local(tensor.chunk(world)[rank].clone(), mesh, [Shard(0)]) if tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }


def about(step: int) -> dict[str, Any]:
    """What a save says about itself, made up."""
    config = {"lr": 1e-8, "name": "é", "layers": [1, 2], "compile": None, "tie": True}
    facts = {"config": config, "data": {"corpus": "toy"}, "strategy": "fsdp", "extra": {"watcher": {"id": "x7"}}}
    return {"step": step, "samples": 8 * step, "tokens": 64 * step, **facts}


def manager(directory: Path, keep_last: int = 2, run_id: str = RUN, asynchronous: bool = False) -> CheckpointManager:
    return CheckpointManager(LocalStorage(directory), keep_last, run_id, asynchronous=asynchronous)


def save_pair(rank: int, world: int, directory: Path, rows: int, run_id: str = RUN) -> None:
    """Job: save the older and the newer step."""
    for step in (OLDER, NEWER):
        manager(directory, run_id=run_id).save(cut(whole_state(step, rows, run_id)), **about(step))


def outcome(directory: Path, rows: int, silent: bool = False) -> str:
    """What a load does after the newer checkpoint was damaged: FELL_BACK, TOOK_NEWER, or in words what is wrong.

    FELL_BACK: it was named (or, with `silent`, need not be) and the older one's very bits came.
    """
    checkpoints = manager(directory)
    try:
        info = checkpoints.latest()
        if info is None:
            return "found no checkpoint"
        state = {name: torch.zeros_like(tensor) for name, tensor in whole_state(OLDER, rows).items()}
        checkpoints.load(state, info)
    except UserError as error:
        return f"nothing could be loaded: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not same_bits(state, whole_state(info.manifest.step, rows)):
        return f"other bits than those of step {info.manifest.step}"
    if info.manifest.step == NEWER:
        return TOOK_NEWER
    if not all(line.isprintable() for line in info.rejected):
        return "printed control characters"
    named = any(step_name(NEWER) in line for line in info.rejected)
    return FELL_BACK if named or silent else "fell back without a word"


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    pairs = ((actual[name].reshape(-1), expected[name].reshape(-1)) for name in expected)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError in the main thread, where a read of a FIFO would wait for ever."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Killed in a save.


def save_until_killed(rank: int, world: int, directory: Path, log: Path, asynchronous: bool, die: float = 0.0) -> None:
    """Job: save steps 1, 2, ... of tensors that hold just the step's number; each commit becomes a line in `log`.

    With `die`, rank 1 kills itself so many seconds after its second commit.
    """
    checkpoints = manager(directory, asynchronous=asynchronous)
    state = cut(killed_state())
    for step in itertools.count(1):
        for tensor in state.values():
            tensor.fill_(step)
        checkpoints.start(state, **about(step))
        if asynchronous:
            time.sleep(0.01)
        saved = checkpoints.finish()
        if saved is None or saved.problems:
            raise RuntimeError(f"step {step}: {saved}")
        with log.open("a") as file:
            file.write(f"{step}\n")
        if step == 2 and die and rank == 1:
            threading.Timer(die, os.kill, (os.getpid(), signal.SIGKILL)).start()


def killed_state() -> dict[str, Tensor]:
    return {name: torch.zeros(_KILLED_ROWS, 256) for name in ("model.a", "optim.a.m")} | {"model.b": torch.zeros(5)}


def commits(log: Path) -> list[int]:
    """The steps in the log, sorted; a last line without its end was being written."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return sorted({int(line) for line in lines})


def after_kill(directory: Path, log: Path) -> tuple[str, bool]:
    """Load and save again as a fresh run would: an empty string or what is wrong, and whether a save was cut short."""
    torn = any(".tmp-" in path.name for path in directory.iterdir())
    checkpoints = manager(directory)
    try:
        for path in directory.iterdir():
            if ".tmp-" not in path.name:
                checkpoints.verified(path.name)
        info = checkpoints.latest()
        if info is None or info.rejected or info.manifest.step < commits(log)[-1]:
            return f"committed {commits(log)[-1:]}, found {info}", torn
        state = killed_state()
        checkpoints.load(state, info)
        if any(bool((tensor != info.manifest.step).any()) for tensor in state.values()):
            return f"step {info.manifest.step} holds other values", torn
        checkpoints.save(state, **about(info.manifest.step + 1))
    except Exception as error:
        return f"{type(error).__name__}: {error}", torn
    left = [path.name for path in directory.iterdir() if ".tmp-" in path.name]
    return f"still there after the next save: {left}" if left else "", torn


# A disk that is full.


@contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A file system in memory of `size` bytes. PermissionError where one may not be mounted."""
    with tempfile.TemporaryDirectory(prefix="disk-") as place:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True)
        if mounted.returncode:
            raise PermissionError(mounted.stderr.decode().strip())
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def save_step(
    rank: int, world: int, directory: Path, step: int, rows: int, keep_last: int, asynchronous: bool
) -> tuple[str, ...]:
    """Job: save one step; the problems, if it could not be saved."""
    try:
        manager(directory, keep_last, asynchronous=asynchronous).save(cut(whole_state(step, rows)), **about(step))
    except UserError as error:
        return error.problems
    return ()
