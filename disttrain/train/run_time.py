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
        self.productive_seconds = kept_seconds
        self.lost_seconds: dict[str, float] = dict(earlier.get("lost_seconds", {}))
        wall = float(earlier.get("wall_seconds", 0.0))
        if earlier:
            self._lose("recomputed", float(earlier.get("productive_seconds", 0.0)) - kept_seconds)
        if earlier.get("state") in ("running", "failed") and "unix_seconds" in earlier:
            down = max(0.0, started - float(earlier["unix_seconds"]))
            self._lose("down", down)
            wall += down
        self._began = started - wall
        self.last_step_seconds: float | None = None
        self._mark = time.perf_counter()

    def ready(self) -> None:
        """The first step begins."""
        self._lose("startup", self.wall_seconds - self.productive_seconds - sum(self.lost_seconds.values()))
        self._mark = time.perf_counter()

    def step(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self.last_step_seconds = now - self._mark
        self.productive_seconds += self.last_step_seconds
        self._mark = now

    def rolled_back(self, kept_seconds: float) -> None:
        """Steps since a checkpoint, that had `kept_seconds`, were in vain."""
        self._lose("rolled_back", self.productive_seconds - kept_seconds)
        self.productive_seconds = kept_seconds
        self._mark = time.perf_counter()

    @contextmanager
    def lost_to(self, cause: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._mark = time.perf_counter()
            self._lose(cause, self._mark - began)

    @property
    def wall_seconds(self) -> float:
        return time.time() - self._began

    @property
    def goodput(self) -> float:
        """The share of the wall time that was productive; wall clocks can be set, so never above one."""
        wall = self.wall_seconds
        return min(1.0, self.productive_seconds / wall) if wall > 0 else 0.0

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
