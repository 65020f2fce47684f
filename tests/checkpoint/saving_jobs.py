"""What the rank pool runs for saves beside the training."""

import errno
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.manager import CheckpointManager
from disttrain.checkpoint.state import training_state
from disttrain.config.train import CheckpointConfig
from disttrain.distributed.collectives import dist_sum_integers
from disttrain.errors import StorageError
from disttrain.train.saving import RunCheckpoints
from tests.checkpoint import toys
from tests.checkpoint.storages import GatedStorage, RefusingStorage


class Told:
    """Stands for the run's output."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)

    def log_checkpoint(self, saved: Any) -> None:
        self.lines.append(f"saved {saved.step}")


def train_on_while_saving(rank: int, world: int, directory: Path, strategy: str) -> tuple[dict[str, Tensor], list]:
    """Save, change every tensor before a byte is written, and let rank 0's disk lag behind the others'."""
    storage = GatedStorage(directory)
    manager = CheckpointManager(storage, 2, "run-a", asynchronous=True)
    if rank:
        storage.gate.set()
    state = training_state(*toys.build(strategy, seed=4))
    before = toys.full(state)
    manager.start(state, **toys.about(4))
    seen = [manager.pending, dist_sum_integers(int(manager.busy))[0] > 0]
    with torch.no_grad():
        for tensor in state.values():
            tensor.add_(1)
    storage.gate.set()
    saved = manager.finish()
    assert saved is not None
    seen += [manager.pending, saved.problems, saved.bytes > 0]
    return before, seen


def run_with(
    rank: int, world: int, directory: Path, storage: str, steps: int, every: int, on_error: str = "continue"
) -> tuple[list[str], list[str]]:
    """A run of `steps` that does nothing but save; what it told, and the problems that ended it."""
    broken = 1 % world
    storages = {
        "gated": lambda: GatedStorage(directory),
        "full once": lambda: RefusingStorage(directory, errno.ENOSPC, ("write",), int(rank == broken)),
        "full for ever": lambda: RefusingStorage(directory, errno.EIO, ("write",), 10**6 * (rank == broken)),
        "read-only": lambda: RefusingStorage(directory, errno.EROFS, ("begin",), 10**6),
        "no commit": lambda: RefusingStorage(directory, errno.ENOSPC, ("commit",)),
    }
    disk: LocalStorage = storages[storage]()
    told = Told()
    config = CheckpointConfig(every=every, keep_last=2, on_error=on_error)  # type: ignore[arg-type]
    run = RunCheckpoints(CheckpointManager(disk, 2, "run-a", asynchronous=True), config, told)  # type: ignore[arg-type]
    state = training_state(*toys.build("fsdp", seed=1))
    try:
        for step in range(1, steps + 1):
            run.look(step, dist_sum_integers(int(run.busy))[0] > 0)
            if run.due(step) or step == steps:
                if isinstance(disk, GatedStorage) and run.manager.pending:
                    threading.Timer(0.3, disk.gate.set).start()
                run.save(state, last=step == steps, **toys.about(step))
            elif not isinstance(disk, GatedStorage):
                while run.manager.pending:
                    run.look(step, dist_sum_integers(int(run.busy))[0] > 0)
    except StorageError as error:
        return told.lines, list(error.problems)
    return told.lines, []
