import base64

import numpy as np
import pytest

from disttrain.report.curves import (
    FEWEST_POINTS,
    MOST_POINTS,
    POINT_BUDGET,
    Curve,
    grid,
    packed,
    points_per_curve,
    smoothed,
    thin,
)


def curve(values: np.ndarray, guide: np.ndarray | None = None) -> Curve:
    step = np.arange(len(values), dtype=float)
    return Curve(step, step * 8, step / 2, values, guide)


@pytest.mark.parametrize("length", [1, 10, 99, 100, 101, 1000, 20_011])
def test_thinning_keeps_extremes_and_ends(length: int) -> None:
    values = np.random.default_rng(length).normal(size=length)
    kept = thin(values, 100)
    assert len(kept) <= 100
    assert (kept[0], kept[-1]) == (0, length - 1)
    assert (np.diff(kept) > 0).all()
    assert {int(values.argmin()), int(values.argmax())} <= set(kept.tolist())
    if length > 1000:
        assert len(kept) > 90


def test_a_single_spike_and_a_single_gap_survive() -> None:
    values = np.ones(5000)
    values[1234], values[3210] = 7.0, np.nan
    kept = thin(values, 60)
    assert len(kept) <= 60
    assert {1234, 3210} <= set(kept.tolist())
    assert 10 < len(thin(np.full(500, np.nan), 50)) <= 50


def test_parts_of_a_stack_keep_the_same_rows() -> None:
    guide = np.random.default_rng(0).normal(size=3000)
    one, other = curve(np.zeros(3000), guide).thinned(80), curve(np.arange(3000.0), guide).thinned(80)
    assert one.step.tolist() == other.step.tolist() == other.values.tolist()
    assert guide.max() in one.guide


def test_all_curves_together_keep_within_the_budget() -> None:
    assert points_per_curve([20_000] * 10) == MOST_POINTS
    for count in (101, 500, 2000):
        assert points_per_curve([20_000] * count) * count <= POINT_BUDGET
    assert points_per_curve([20_000] * 10**5) == FEWEST_POINTS
    assert points_per_curve([3] * 10**4) == MOST_POINTS


def test_smoothing() -> None:
    line = np.linspace(5, 1, 200)
    assert smoothed(line, 11)[20:-20] == pytest.approx(line[20:-20])
    assert smoothed(line, 11)[0] == pytest.approx(line[0])
    line[100] = 90.0
    assert smoothed(line, 11).max() < 5.1
    line[50:60] = np.nan
    assert np.isfinite(smoothed(line, 21)).all()
    assert np.isnan(smoothed(np.full(40, np.inf), 11)).all()


def test_packed_numbers_come_back() -> None:
    values = np.array([1.5, np.inf, np.nan, 1e300, -2.0])
    stored = packed(values, "f4")
    back = np.frombuffer(base64.b64decode(stored["bdata"]), dtype="<f4")
    assert np.isnan(back[1:4]).all()
    assert back[[0, 4]].tolist() == [1.5, -2.0]
    assert np.frombuffer(base64.b64decode(packed(np.array([7.0, 2**31 - 1]), "i4")["bdata"]), "<i4")[1] == 2**31 - 1


def test_a_heat_map_keeps_the_largest_of_each_column() -> None:
    values = np.zeros(1000)
    values[501] = 3.0
    late = Curve(
        *(axis[600:] for axis in (curve(values).step, curve(values).tokens, curve(values).seconds)), values[600:]
    )
    axes, table = grid([curve(values), late], 100)
    assert table.shape == (2, 100)
    assert (table[0].max(), int(table[0].argmax()), axes.step[50]) == (3.0, 50, 500.0)
    assert np.isnan(table[1, :60]).all()
    assert (table[1, 60:] == 0).all()
