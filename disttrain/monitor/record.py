"""What one log row is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie in `edges[i]` to `edges[i + 1]`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def trimmed(cls, edges: Sequence[float], counts: Sequence[int]) -> Histogram:
        """Without the empty bins at both ends."""
        filled = [index for index, count in enumerate(counts) if count]
        if not filled:
            return cls((), ())
        first, last = filled[0], filled[-1]
        return cls(tuple(edges[first : last + 2]), tuple(counts[first : last + 1]))


Value = float | Histogram
Record = Mapping[str, Value]
"""`step`, `tokens`, `unix_seconds`, and metrics by name, units in the names."""


def plain(record: Record) -> dict[str, object]:
    """For JSON, which knows no NaN: a number that is not finite is written as its name."""
    return {key: _plain(value) for key, value in record.items()}


def scalars(record: Record) -> dict[str, float]:
    return {key: value for key, value in record.items() if not isinstance(value, Histogram)}


def histograms(record: Record) -> dict[str, Histogram]:
    return {key: value for key, value in record.items() if isinstance(value, Histogram)}


def _plain(value: Value) -> object:
    if isinstance(value, Histogram):
        return {"edges": list(value.edges), "counts": list(value.counts)}
    return value if math.isfinite(value) else str(value)
