"""Signals, a file and a time limit become a wish that the next step answers."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""SIGHUP is a closed terminal, SIGUSR1 what Slurm is asked to send before the end (`--signal`)."""


class StopRequest:
    """Inside this context a stop signal only sets `wanted`; all ranks agree on it in the step's own reduction.

    So does a `file` that appears, and the `deadline` (Unix time). A second signal does no harm: whoever must end now
    has SIGKILL.
    """

    def __init__(self, file: Path | None = None, deadline: float | None = None) -> None:
        self.file, self.deadline = file, deadline
        self.reason: str | None = None

    @property
    def wanted(self) -> bool:
        if self.reason is None and self.deadline is not None and time.time() >= self.deadline:
            self.reason = "the job's time limit comes near"
        if self.reason is None and self.file is not None and self.file.exists():
            self.reason = f"{self.file} is there"
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
