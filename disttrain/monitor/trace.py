"""What a chrome trace of torch's profiler says in brief: pure functions over its events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

TOP = 10
_MICROSECONDS = 1e6
_COMMUNICATION = ("gloo:", "nccl:", "nccl", "c10d::", "record_param_comms")

Interval = tuple[float, float]
Event = dict[str, Any]


def summarise_trace(events: Iterable[Event], steps: int) -> dict[str, Any]:
    """Seconds of a step: of its wall time, of communication in flight, of that while nothing was computed; and the
    dearest operators by time of their own, which is all of a kernel's on a GPU.

    Where there are kernels they are the computing and the communication; on a CPU computing is what the operators of
    the busiest thread do, and communication what gloo's threads have under way.
    """
    complete = [event for event in events if event.get("ph") == "X" and event.get("dur", 0) > 0]
    kernels = [event for event in complete if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    operators = [event for event in complete if event.get("cat") == "cpu_op"]
    if kernels:
        sent = [event for event in kernels if _communicates(event)]
        computed = [event for event in kernels if not _communicates(event)]
        own = [(event["name"], event["dur"]) for event in kernels]
    else:
        sent = [e for e in complete if e.get("cat") == "user_annotation" and str(e["name"]).startswith("gloo:")]
        thread = _busiest_thread(operators)
        own = [pair for line in _threads(operators).values() for pair in self_times(line)]
        computed = [event for event in operators if event["tid"] == thread and not _communicates(event)]
    everything = union(_interval(event) for event in (kernels or operators))
    span = everything[-1][1] - everything[0][0] if everything else 0.0
    communication, computing = union(map(_interval, sent)), union(map(_interval, computed))
    return {
        "step_seconds": span / steps / _MICROSECONDS,
        "communication_seconds": length(communication) / steps / _MICROSECONDS,
        "exposed_communication_seconds": length(difference(communication, computing)) / steps / _MICROSECONDS,
        "operators": _dearest(own, steps),
    }


def self_times(events: Sequence[Event]) -> list[tuple[str, float]]:
    """Each operator's time less that of the operators inside it; `events` of one thread, which nest."""
    result: list[list[Any]] = []
    open_until: list[tuple[float, int]] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        start, end = _interval(event)
        while open_until and open_until[-1][0] <= start:
            open_until.pop()
        if open_until:
            result[open_until[-1][1]][1] -= event["dur"]
        open_until.append((end, len(result)))
        result.append([event["name"], event["dur"]])
    return [(name, seconds) for name, seconds in result]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points, in intervals that are in order and do not touch."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def difference(these: Sequence[Interval], those: Sequence[Interval]) -> list[Interval]:
    """What lies in `these` and not in `those`; both as `union` gives them."""
    left: list[Interval] = []
    index = 0
    for start, end in these:
        while index < len(those) and those[index][1] <= start:
            index += 1
        at, following = start, index
        while following < len(those) and those[following][0] < end:
            if those[following][0] > at:
                left.append((at, those[following][0]))
            at = max(at, those[following][1])
            following += 1
        if at < end:
            left.append((at, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _communicates(event: Event) -> bool:
    return str(event["name"]).lower().startswith(_COMMUNICATION)


def _threads(events: Iterable[Event]) -> dict[Any, list[Event]]:
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    return threads


def _busiest_thread(events: Iterable[Event]) -> Any:
    times = {thread: length(union(map(_interval, line))) for thread, line in _threads(events).items()}
    return max(times, key=lambda thread: times[thread], default=None)


def _dearest(own: Iterable[tuple[str, float]], steps: int) -> list[dict[str, Any]]:
    """Per step; `share` is of all operators' own time."""
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, microseconds in own:
        times[name] += microseconds
        calls[name] += 1
    total = sum(times.values())
    dearest = sorted(times, key=lambda name: -times[name])[:TOP]
    return [
        {
            "name": name,
            "calls": round(calls[name] / steps),
            "self_seconds": times[name] / steps / _MICROSECONDS,
            "share": times[name] / total if total else 0.0,
        }
        for name in dearest
    ]
