"""Intervals and verdicts, against scipy where it is installed and against the tables of books."""

from __future__ import annotations

import math
import random

import pytest

from disttrain.studies.statistics import difference, interval, p_below, t_cdf, t_quantile

TABLE = {(0.975, 1): 12.7062, (0.975, 2): 4.3027, (0.975, 9): 2.2622, (0.995, 4): 4.6041, (0.95, 30): 1.6973}


@pytest.mark.parametrize(("place", "expected"), TABLE.items())
def test_quantiles_are_those_of_the_tables(place: tuple[float, int], expected: float) -> None:
    assert t_quantile(*place) == pytest.approx(expected, abs=5e-5)


def test_student_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 7, 40):
        for value in (-4.0, -0.3, 0.0, 0.8, 3.0, 25.0):
            assert t_cdf(value, freedom) == pytest.approx(stats.t.cdf(value, freedom), abs=1e-14)
        for probability in (0.5, 0.6, 0.975, 0.9995):
            assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), abs=1e-10)
    values, target = [3.271, 3.279, 3.268, 3.281], 3.28
    assert p_below(values, target) == pytest.approx(stats.ttest_1samp(values, target, alternative="less").pvalue)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values).low == pytest.approx(low)
    assert interval(values).high == pytest.approx(high)


def test_pairs_see_what_means_do_not() -> None:
    """Seeds differ by far more than the optimizers; the difference on each seed is nearly the same."""
    base = {1: 3.0, 2: 4.0, 3: 5.0, 4: 3.5}
    theirs = {seed: loss - 0.05 + 0.002 * (-1) ** seed for seed, loss in base.items()}
    found = difference(theirs, base, comparisons=1)
    assert found is not None
    assert found.verdict == "better"
    assert found.interval.mean == pytest.approx(-0.05)
    assert difference(base, theirs, comparisons=1).verdict == "worse"  # type: ignore[union-attr]


def test_noise_is_not_distinguishable_and_more_comparisons_ask_for_more() -> None:
    base = {1: 3.0, 2: 3.0, 3: 3.0}
    theirs = {1: 2.99, 2: 2.988, 3: 2.992}
    assert difference(theirs, base, comparisons=1).verdict == "better"  # type: ignore[union-attr]
    many = difference(theirs, base, comparisons=20)
    assert many is not None
    assert many.verdict == "not distinguishable"
    assert difference({1: 2.9, 2: 3.1, 3: 3.0}, base, 1).verdict == "not distinguishable"  # type: ignore[union-attr]


def test_one_pair_has_no_verdict_and_no_pair_no_difference() -> None:
    one = difference({1: 2.0, 5: 1.0}, {1: 3.0, 2: 3.0}, 1)
    assert one is not None
    assert (one.verdict, one.interval.low, one.interval.count) == ("no verdict", None, 1)
    assert difference({1: 2.0}, {2: 3.0}, 1) is None
    assert interval([3.0, math.inf]).low is None
    wild = difference({1: math.inf, 2: 3.0}, {1: 3.0, 2: math.inf}, 1)  # infinities of both signs
    assert wild is not None
    assert (wild.verdict, wild.interval.low) == ("no verdict", None)
    same = difference({1: 3.0, 2: 4.0}, {1: 3.0, 2: 4.0}, 1)
    assert same is not None
    assert (same.verdict, same.interval.low, same.interval.high) == ("not distinguishable", 0.0, 0.0)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        found = interval([draw.gauss(1.0, 2.0) for _ in range(3)])
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.0 <= found.high
    assert 0.935 < held / 2000 < 0.965


def test_a_mean_below_a_target() -> None:
    assert p_below([1.0], 2.0) is None
    assert p_below([1.0, 1.0], 2.0) == 0.0
    assert p_below([2.0, 2.0], 2.0) == 1.0
    p = p_below([3.2, 3.4], 3.3)
    assert p == pytest.approx(0.5)
