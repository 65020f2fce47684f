"""Where the wall time of a run goes, over all its starts. No torch here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class RunTime:
    """Productive are the steps that still count; everything else since the first start is lost, by cause.

    `started` is when this start began (Unix time), `kept_seconds` the productive time of the steps up to the checkpoint
    that it resumes, `earlier` the last status of the start before: what that did beyond the checkpoint was in vain
    (`recomputed`), and so was the time in which it was dead (`down`). Time between a stop on request and the next
    start is not the run's.
    """

    def __init__(self, started: float, kept_seconds: float, earlier: Mapping[str, Any]) -> None:
        known = {key: _number(earlier.get(key)) for key in ("wall_seconds", "productive_seconds", "unix_seconds")}
        lost = earlier.get("lost_seconds")
        self.productive_seconds = kept_seconds
        self.lost_seconds = {str(k): _number(v) for k, v in lost.items()} if isinstance(lost, dict) else {}
        done_since = known["productive_seconds"] - kept_seconds
        if earlier:
            self._lose("recomputed", done_since)
        if earlier.get("state") in ("running", "failed") and known["unix_seconds"]:
            # What was done between the last status and the checkpoint was not lost.
            self._lose("down", started - known["unix_seconds"] - max(0.0, -done_since))
        # A clock that was set back, or a status that is gone, must not make the run shorter than its parts.
        past = max(known["wall_seconds"], self.productive_seconds + sum(self.lost_seconds.values()))
        self._past, self._since = past, time.perf_counter() - max(0.0, time.time() - started)
        self._mark = time.perf_counter()
        self.last_step_seconds: float | None = None

    def ready(self) -> None:
        """The first step begins; everything so far that has no other cause was the start."""
        self._lose("startup", self.wall_seconds - self.productive_seconds - sum(self.lost_seconds.values()))
        self._mark = time.perf_counter()

    def step(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self.last_step_seconds = now - self._mark
        self.productive_seconds += self.last_step_seconds
        self._mark = now

    def rolled_back(self, kept_seconds: float) -> None:
        """Steps since a checkpoint, that had `kept_seconds`, were in vain, and so was the way back."""
        now = time.perf_counter()
        self._lose("rolled_back", self.productive_seconds - kept_seconds + now - self._mark)
        self.productive_seconds, self._mark = kept_seconds, now

    @contextmanager
    def lost_to(self, cause: str) -> Iterator[None]:
        """From the end of the last step (or loss) on."""
        began = self._mark
        try:
            yield
        finally:
            self._mark = time.perf_counter()
            self._lose(cause, self._mark - began)

    @contextmanager
    def lost_within(self, cause: str) -> Iterator[None]:
        """This very time and no more; what came before it since the last step belongs to the next one."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._mark += seconds
            self._lose(cause, seconds)

    @property
    def wall_seconds(self) -> float:
        """Since the first start; within one by a clock that nobody sets."""
        return self._past + time.perf_counter() - self._since

    @property
    def goodput(self) -> float:
        """The share of the wall time that was productive."""
        return self.productive_seconds / max(self.wall_seconds, self.productive_seconds, 1e-9)

    def status(self) -> dict[str, Any]:
        """For status.json, from which the next start goes on."""
        return {
            "unix_seconds": time.time(),
            "wall_seconds": self.wall_seconds,
            "productive_seconds": self.productive_seconds,
            "goodput": self.goodput,
            "lost_seconds": dict(self.lost_seconds),
        }

    def record(self) -> dict[str, Any]:
        """For a checkpoint's `extra`."""
        return {"run_time": {"productive_seconds": self.productive_seconds}}

    def _lose(self, cause: str, seconds: float) -> None:
        if seconds > 0:
            self.lost_seconds[cause] = self.lost_seconds.get(cause, 0.0) + seconds


def resume_time(started: float, extra: Mapping[str, Any], earlier: Mapping[str, Any]) -> RunTime:
    """From what a checkpoint holds and the status that the start before has left; both empty in a new run."""
    return RunTime(started, kept_seconds(extra), earlier)


def kept_seconds(extra: Mapping[str, Any]) -> float:
    """The productive seconds up to a checkpoint with `extra`."""
    return float(extra.get("run_time", {}).get("productive_seconds", 0.0))


def _number(value: Any) -> float:
    """Of a file that anybody may have written: what is no number counts as nothing."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
