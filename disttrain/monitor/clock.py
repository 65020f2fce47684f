"""Where the time of a step goes, by parts that add up, without waiting for a device."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Protocol

import torch

WAITING = "communication"
MANY_EVENTS = 4096
_OWN = ("forward", "backward", "optimizer")
"""Parts in which a thread that sleeps waits for other ranks."""


class StepClock(Protocol):
    """`lap(part)` gives the time since the last lap, or since `start`, to `part`."""

    def start(self) -> None: ...

    def lap(self, part: str) -> None: ...

    def stop(self) -> None:
        """The step is over."""
        ...

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Seconds of each part since the last call, and of each step; on a CPU without what it waited for others.

        Waits for the device where that has the clock: call it when it was waited for anyway.
        """
        ...


def build_clock(device: torch.device) -> StepClock:
    return EventClock(device) if device.type == "cuda" else HostClock()


class HostClock:
    """Where the thread computes itself. In forward, backward and optimizer, time asleep is time in collectives.

    Asleep is wall time less the thread's processor time less what it waited for a core, which Linux counts. A thread
    that shares its work with others (more than one thread per rank) also sleeps while these work.
    """

    def __init__(self) -> None:
        self._waited_for_core = _WaitForCore()
        self._forget()
        self.start()

    def start(self) -> None:
        self._mark = self._now()
        self._step = 0.0

    def lap(self, part: str) -> None:
        wall, awake = self._now()
        spent = wall - self._mark[0]
        asleep = min(max(spent - (awake - self._mark[1]), 0.0), spent)
        self._mark = (wall, awake)
        if part == WAITING:
            asleep = spent
        elif part not in _OWN:
            asleep = 0.0
        self._parts[WAITING] = self._parts.get(WAITING, 0.0) + asleep
        self._step += spent - asleep
        if part != WAITING:
            self._parts[part] = self._parts.get(part, 0.0) + spent - asleep

    def stop(self) -> None:
        self._steps.append(self._step)

    def read(self) -> tuple[dict[str, float], list[float]]:
        parts, steps = self._parts, self._steps
        self._forget()
        return parts, steps

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.thread_time() + self._waited_for_core.seconds()

    def _forget(self) -> None:
        self._parts: dict[str, float] = {}
        self._steps: list[float] = []


class EventClock:
    """Where a GPU computes: events in its stream, read when it has been waited for. What a kernel waits for is in the
    part that it belongs to; the profiler tells how much of that is communication. Parts of the host are taken there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._laps: list[tuple[str, torch.cuda.Event]] = []
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._host: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._step_seconds: list[float] = []
        self.start()

    def start(self) -> None:
        self._at = time.perf_counter()
        self._first = self._event()
        self._laps.append(("", self._first))

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        event = self._event()
        if part in _OWN:
            self._laps.append((part, event))
        else:
            # The device has nothing to do with it: its time there is that of a stream without work.
            self._host[part] = self._host.get(part, 0.0) + now - self._at
            self._laps.append(("", event))
        self._at = now

    def stop(self) -> None:
        self._steps.append((self._first, self._laps[-1][1]))
        # Rows may be far apart: what the device has done needs no events any more.
        if len(self._laps) > MANY_EVENTS and self._laps[-1][1].query():
            self._fold()

    def read(self) -> tuple[dict[str, float], list[float]]:
        torch.cuda.synchronize(self.device)
        self._fold()
        parts, steps = self._parts, self._step_seconds
        self._parts, self._step_seconds = {}, []
        return parts, steps

    def _fold(self) -> None:
        for part, seconds in self._host.items():
            if part != WAITING:
                self._parts[part] = self._parts.get(part, 0.0) + seconds
        for (_, before), (part, after) in zip(self._laps, self._laps[1:], strict=False):
            if part:
                self._parts[part] = self._parts.get(part, 0.0) + before.elapsed_time(after) / 1e3
        self._step_seconds += [first.elapsed_time(last) / 1e3 for first, last in self._steps]
        self._laps, self._steps, self._host = [], [], {}

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class _WaitForCore:
    """Seconds for which this thread could have run and had no core; 0 where the system does not tell."""

    def __init__(self) -> None:
        self._file: int | None = None
        with suppress(OSError):
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def seconds(self) -> float:
        if self._file is None:
            return 0.0
        try:
            return int(os.pread(self._file, 64, 0).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0

    def __del__(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
