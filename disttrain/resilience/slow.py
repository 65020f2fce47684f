"""Which rank makes the others wait: a pure function over what each of them computed itself. No torch here."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from statistics import median

WINDOWS = (10, 20, 64)
"""Steps: short ones find a rank soon, long ones where times vary much."""
_LEAST_STEPS = 20
_CERTAIN = 4.5
"""Standard errors of the median, if steps are independent: thousands of windows of many ranks must pass unnoticed."""
LEAST_SECONDS = 1e-3
"""Below that per step it is the operating system, not a rank."""


def slow_ranks(
    seconds: Sequence[Sequence[float]], least_factor: float, least_seconds: float = LEAST_SECONDS
) -> dict[int, float]:
    """The ranks that take `least_factor` times as long as the others, and `least_seconds` more, beyond doubt; how much.

    `seconds` are [steps][ranks] of each rank's own work, without what it waited for others, all ranks with equally
    much to do. A rank is compared with the median of the others, step by step; its factor is the median over the last
    steps, so that single hiccups count for nothing. The standard error of such a median comes from the absolute
    deviations of all ranks together.
    """
    if len(seconds) < _LEAST_STEPS or len(seconds[0]) < 2:
        return {}
    ratios = [_logarithms(step) for step in seconds]
    middle = _medians(ratios)
    deviation = median(abs(ratio - factor) for row in ratios for ratio, factor in zip(row, middle, strict=True))
    found: dict[int, float] = {}
    for length in WINDOWS:
        last = ratios[-length:]
        # 1.4826 makes a standard deviation of it, 1.2533 the error of a median of that of a mean.
        least = max(math.log(least_factor), _CERTAIN * 1.4826 * 1.2533 * deviation / math.sqrt(len(last)))
        found = {rank: math.exp(factor) for rank, factor in enumerate(_medians(last)) if factor >= least} | found
    typical = median(median(step) for step in seconds)
    return {rank: factor for rank, factor in sorted(found.items()) if (factor - 1.0) * typical >= least_seconds}


class SlowRanks:
    """Follows the last steps and says when a rank becomes slow, and when it no longer is."""

    def __init__(self, least_factor: float, least_seconds: float = LEAST_SECONDS) -> None:
        self.least_factor, self.least_seconds = least_factor, least_seconds
        self._steps: deque[Sequence[float]] = deque(maxlen=max(WINDOWS))
        self._named: set[int] = set()

    def look(self, steps: Sequence[Sequence[float]]) -> list[str]:
        """What is new after `steps` more, [steps][ranks] in seconds."""
        if not steps or len(steps[0]) < 2:
            return []
        self._steps.extend(steps)
        history = list(self._steps)
        slow = slow_ranks(history, self.least_factor, self.least_seconds)
        lines = [
            f"rank {rank} is slow: its own work takes {factor:.2f} times as long as the others', who wait for it"
            for rank, factor in slow.items()
            if rank not in self._named
        ]
        # Half the way back, so that a rank on the edge is not told of at every row.
        factors = _medians([_logarithms(step) for step in history[-min(WINDOWS) :]])
        back = {rank for rank in self._named if factors[rank] < math.log(self.least_factor) / 2}
        recovered = back - set(slow)
        self._named = set(slow) | (self._named - recovered)
        return lines + [f"rank {rank} is no longer slow" for rank in sorted(recovered)]


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    return [median(column) for column in zip(*rows, strict=True)]


def _logarithms(step: Sequence[float]) -> list[float]:
    """Of each rank's time over the median of all others'."""
    times = [max(own, 1e-12) for own in step]
    ordered = sorted(times)
    return [math.log(own / _median_without(ordered, bisect_left(ordered, own))) for own in times]


def _median_without(values: Sequence[float], left_out: int) -> float:
    """Of sorted `values` but one."""

    def at(index: int) -> float:
        return values[index + (index >= left_out)]

    count = len(values) - 1
    return (at((count - 1) // 2) + at(count // 2)) / 2
