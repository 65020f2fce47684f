"""What seeds allow to be said: paired differences, Student's intervals, a verdict. Pure.

Losses of one seed share the order of the data and the initial weights, so that their difference is what the optimizers
make of it. Intervals hold for all comparisons of a table together (Bonferroni): of twenty optimizers that are all
alike, one would look better by chance otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

CONFIDENCE = 0.95
REACHED_P = 0.01
"""Of the one-sided test whether a mean is below a target."""
Verdict = Literal["better", "worse", "not distinguishable", "no verdict"]
_CONTINUED = 300
_TINY = 1e-300


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie; without bounds (None) where there are fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Of paired losses, theirs less the baseline's: below zero is better."""

    interval: Interval
    verdict: Verdict


def interval(values: Sequence[float], confidence: float = CONFIDENCE, comparisons: int = 1) -> Interval:
    """Student's interval of a mean, wide enough for `comparisons` of them to hold together."""
    count = len(values)
    mean = fmean(values) if all(map(math.isfinite, values)) else math.nan  # infinities of both signs have no sum
    if count < 2 or not math.isfinite(mean):
        return Interval(mean, None, None, count)
    level = 1 - (1 - confidence) / comparisons
    half = t_quantile((1 + level) / 2, count - 1) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def difference(theirs: Mapping[int, float], baseline: Mapping[int, float], comparisons: int) -> Difference | None:
    """By seeds that both have; None where there is no such seed."""
    pairs = [theirs[seed] - baseline[seed] for seed in sorted(theirs.keys() & baseline.keys())]
    if not pairs:
        return None
    found = interval(pairs, comparisons=comparisons)
    return Difference(found, _verdict(found))


def _verdict(found: Interval) -> Verdict:
    if found.low is None or found.high is None:
        return "no verdict"
    if found.high < 0:
        return "better"
    return "worse" if found.low > 0 else "not distinguishable"


def p_below(values: Sequence[float], target: float) -> float | None:
    """One-sided p value for a mean below `target`; None for fewer than two values."""
    if len(values) < 2:
        return None
    spread, gap = stdev(values), target - fmean(values)
    if not spread:
        return 0.0 if gap > 0 else 1.0
    return 1 - t_cdf(gap * math.sqrt(len(values)) / spread, len(values) - 1)


def t_quantile(probability: float, freedom: int) -> float:
    """Where Student's distribution reaches `probability` (0.5 to 1), by halving."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(value: float, freedom: int) -> float:
    """Student's distribution through the regularised incomplete beta function."""
    tail = _beta(freedom / 2, 0.5, freedom / (freedom + value * value)) / 2
    return 1 - tail if value > 0 else tail


def _beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), on the side on which the continued fraction converges fast (Abramowitz and Stegun 26.5.8)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(b, a, 1 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / a / _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)) by Lentz's way from the front."""
    value = c = 1.0
    d = 0.0
    for step in range(1, _CONTINUED):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d or _TINY)
        c = 1 + term / c or _TINY
        value *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return value
