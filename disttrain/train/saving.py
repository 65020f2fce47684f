"""When a run saves, what it tells about it, and what it does when the disk refuses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from disttrain.checkpoint.agreement import on_rank_zero
from disttrain.checkpoint.manager import CheckpointManager, Saved
from disttrain.config.train import CheckpointConfig
from disttrain.errors import StorageError
from disttrain.train.output import RunOutput

WORTH_TELLING_SECONDS = 0.1


class RunCheckpoints:
    """The saves of one run, one at a time. All functions are collective but `due` and `busy`."""

    def __init__(self, manager: CheckpointManager, config: CheckpointConfig, output: RunOutput) -> None:
        self.manager = manager
        self.config = config
        self.output = output
        self._retry_at: int | None = None

    @property
    def busy(self) -> bool:
        return self.manager.busy

    def due(self, step: int) -> bool:
        return step % self.config.every == 0 or (self._retry_at is not None and step >= self._retry_at)

    def save(self, state: Mapping[str, Tensor], *, last: bool, **about: Any) -> None:
        """Save what `about` (the manager's keywords) describes; the run's last save is waited for.

        Raises StorageError when it cannot be done and the run may not, or cannot, go on without it.
        """
        self.settle(about["step"])
        self._retry_at = None
        try:
            self.manager.start(state, **about)
        except StorageError as error:
            self._failed(about["step"], error.problems, about["step"], last)
        if last:
            self._tell(self.manager.finish(), about["step"], last)

    def look(self, step: int, some_rank_is_busy: bool) -> None:
        """After each step: commit what all ranks have written, and tell how a save ended."""
        if self.manager.pending and not some_rank_is_busy:
            self._tell(self.manager.advance(), step, last=False)

    def settle(self, step: int) -> None:
        """Wait for the save under way, and tell how it ended."""
        if not self.manager.pending:
            return
        began = time.perf_counter()
        earlier = self.manager.finish()
        waited = time.perf_counter() - began
        if earlier is not None and waited >= WORTH_TELLING_SECONDS:
            self.output.say(
                f"step {step}: waited {waited:.1f} s for the checkpoint of step {earlier.step} that was still being "
                "written; a larger checkpoint.every or a faster disk avoids that"
            )
        self._tell(earlier, step, last=False)

    def _tell(self, saved: Saved | None, now: int, last: bool) -> None:
        if saved is None:
            return
        if saved.problems:
            self._failed(saved.step, saved.problems, now, last)
        else:
            self.output.log_checkpoint(saved)

    def _failed(self, step: int, problems: tuple[str, ...], now: int, last: bool) -> None:
        held = on_rank_zero(self.manager.storage.committed)
        stays = f"{held[0]} stays the newest" if held else "there is none yet"
        lines = [f"checkpoint of step {step} not saved: {problem} ({stays})" for problem in problems]
        if last or self.config.on_error == "stop":
            raise StorageError(lines)
        self._retry_at = now + max(1, self.config.every // 10)
        for line in lines:
            self.output.warn(f"{line}; training goes on and tries again at step {self._retry_at}")


def room_note(manager: CheckpointManager, state: Mapping[str, Tensor]) -> list[str]:
    """A warning where two checkpoints of `state` will not fit: the old one goes only when the new one is there."""
    needed_bytes = 2 * sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    free_bytes = on_rank_zero(manager.storage.free_bytes)
    if free_bytes is None or free_bytes >= needed_bytes:
        return []
    return [
        f"{manager.storage.place('')}: {free_bytes:,} bytes free, two checkpoints need {needed_bytes:,} "
        f"({needed_bytes - free_bytes:,} short): saving may fail; free space or move the run folder"
    ]
