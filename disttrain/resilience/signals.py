"""Signals, a file and a time limit become a wish that the next step answers."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""SIGHUP is a closed terminal, SIGUSR1 what Slurm is asked to send before the end (`--signal`)."""


def heard_signals() -> list[signal.Signals]:
    """Without SIGHUP where it was ignored when we were started: `nohup` means it. SIGINT is heard always: shells start
    what runs in the background without it, and ranks are told by it that their parent has died."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]


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
        if self.reason is None and self.file is not None:
            with suppress(OSError):  # a file server that stumbles is no reason to end
                self.reason = f"{self.file} is there" if self.file.exists() else None
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._on_signal) for number in heard_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
