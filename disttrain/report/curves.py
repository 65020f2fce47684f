"""Curves: values against step, tokens and time; thinned for the page so that no extreme is lost."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_POINTS = 1000
"""Of one curve on the page."""
POINT_BUDGET = 100_000
"""Of all curves together: each costs 21 bytes, so that the file stays small enough for a mail."""
FEWEST_POINTS = 40


@dataclass(frozen=True)
class Curve:
    """Values against the three axes; `seconds` since the start of the run (nan where the run recorded no time).

    Thinning keeps the extremes of `guide` where it is set: parts of a stack must keep the same rows.
    """

    step: Floats
    tokens: Floats
    seconds: Floats
    values: Floats
    guide: Floats | None = None

    def __len__(self) -> int:
        return len(self.values)

    def at(self, rows: NDArray[Any]) -> Curve:
        """Only these rows: indices, or a mask."""
        guide = None if self.guide is None else self.guide[rows]
        return Curve(self.step[rows], self.tokens[rows], self.seconds[rows], self.values[rows], guide)

    def with_values(self, values: Floats) -> Curve:
        return replace(self, values=values)

    def finite(self) -> Floats:
        return self.values[np.isfinite(self.values)]

    def thinned(self, limit: int) -> Curve:
        """At most `limit` points."""
        return self if len(self) <= limit else self.at(thin(self.values if self.guide is None else self.guide, limit))

    def encoded(self, seconds_per_unit: float) -> dict[str, Any]:
        """The axes as the page takes them: packed numbers."""
        return {
            "step": packed(self.step, "i4"),
            "tokens": packed(self.tokens, "f4"),
            "time": packed(self.seconds / seconds_per_unit, "f4"),
        }


def thin(values: Floats, limit: int) -> NDArray[np.intp]:
    """Indices of at most `limit` values: both ends, the lowest and the highest of each bucket of neighbours, and where
    a bucket holds a value that is not finite, one such (it is a gap in the curve)."""
    last = len(values) - 1
    if last < limit:
        return np.arange(last + 1)
    good = np.isfinite(values)
    per_bucket = 2 if good.all() else 3
    edges = np.linspace(1, last, max(1, (limit - 2) // per_bucket) + 1).astype(int)
    low, high = np.where(good, values, np.inf), np.where(good, values, -np.inf)
    kept = {0, last}
    for start, stop in pairwise(edges):
        if good[start:stop].any():
            kept |= {start + int(low[start:stop].argmin()), start + int(high[start:stop].argmax())}
        if not good[start:stop].all():
            kept.add(start + int(good[start:stop].argmin()))
    return np.array(sorted(kept))


def points_per_curve(lengths: Sequence[int]) -> int:
    """How many points each curve may have, so that all of them together keep within the budget."""
    if sum(min(length, MOST_POINTS) for length in lengths) <= POINT_BUDGET:
        return MOST_POINTS
    return max(FEWEST_POINTS, POINT_BUDGET // len(lengths))


def smoothed(values: Floats, window: int) -> Floats:
    """The mean over `window` neighbours (fewer near the ends) of the medians of five; gaps do not count.

    The medians keep a single spike from lifting the line wherever it is in the window.
    At the start, where a loss falls steeply, both sides have as many, so that the mean is not too low.
    """
    finite = np.pad(np.where(np.isfinite(values), values, np.nan), 2, mode="edge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # five gaps in a row are a gap
        values = np.nanmedian(sliding_window_view(finite, 5), axis=1)
    good = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(good, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(good)))
    index = np.arange(len(values))
    before = np.minimum(window // 2, index)
    after = np.minimum(before, index[::-1])
    total, count = sums[index + after + 1] - sums[index - before], counts[index + after + 1] - counts[index - before]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def packed(values: Floats, dtype: str) -> dict[str, str]:
    """Numbers in half the bytes that their digits would take, in the form that plotly reads; not finite is nan."""
    if dtype == "f4":
        values = np.where(np.abs(values) < np.finfo(np.float32).max, values, np.nan)
    return {"dtype": dtype, "bdata": base64.b64encode(values.astype(f"<{dtype}").tobytes()).decode()}


def grid(curves: Sequence[Curve], columns: int) -> tuple[Curve, Floats]:
    """Curves over the same run as the rows of a heat map of at most so many columns: the largest value of each bucket.

    The returned curve holds the axes.
    """
    widest = max(curves, key=len)
    edges = np.unique(np.linspace(0, len(widest), min(columns, len(widest)) + 1).astype(int))
    lows = widest.step[edges[:-1]]
    table = np.full((len(curves), len(lows)), np.nan)
    for row, curve in enumerate(curves):
        buckets = np.searchsorted(lows, curve.step, side="right") - 1
        usable = (buckets >= 0) & np.isfinite(curve.values)
        np.fmax.at(table[row], buckets[usable], curve.values[usable])
    return widest.at(edges[:-1]), table
