"""The learning-rate laws at the points where their values are known, and between them."""

import math
from itertools import pairwise

import pytest

from disttrain.schedule import SHAPES, LrSchedule, Shape

WARMUP, HORIZON = 1_000, 11_000


def factor(shape: Shape, position: int, final_ratio: float = 0.1) -> float:
    return LrSchedule(shape, WARMUP, HORIZON, final_ratio).factor(position)


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_is_linear_and_ends_at_the_peak(shape: Shape) -> None:
    assert [factor(shape, position) for position in (1, 250, 500, 999, 1_000)] == [0.001, 0.25, 0.5, 0.999, 1.0]


@pytest.mark.parametrize(
    ("shape", "quarters"),
    [
        # The share of the way from 0.1 up to 1 that is left after 1/4, 1/2 and 3/4 of the decay.
        ("cosine", (0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125))),
        ("linear", (0.75, 0.5, 0.25)),
        ("wsd", (1.0, 1.0, 1.0)),
    ],
)
def test_the_decay_at_its_quarters(shape: Shape, quarters: tuple[float, ...]) -> None:
    seen = [factor(shape, WARMUP + part * (HORIZON - WARMUP) // 4) for part in (1, 2, 3)]
    assert seen == pytest.approx([0.1 + 0.9 * left for left in quarters], abs=1e-15)


def test_wsd_decays_in_the_last_fifth() -> None:
    assert factor("wsd", WARMUP + 8_000) == pytest.approx(1.0, abs=1e-15)
    assert factor("wsd", WARMUP + 9_000) == pytest.approx(0.55, abs=1e-15)
    assert factor("wsd", WARMUP + 9_500) == pytest.approx(0.325, abs=1e-15)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final_ratio", [0.0, 0.1, 1.0])
def test_the_end_and_what_lies_beyond(shape: Shape, final_ratio: float) -> None:
    for position in (HORIZON, HORIZON + 1, 100 * HORIZON):
        assert factor(shape, position, final_ratio) == pytest.approx(final_ratio, abs=1e-15)


def test_constant_never_decays() -> None:
    assert {factor("constant", position) for position in (WARMUP, HORIZON, 100 * HORIZON)} == {1.0}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("horizon", [400, 1_000])
def test_a_horizon_inside_the_warm_up_means_no_decay(shape: Shape, horizon: int) -> None:
    schedule = LrSchedule(shape, WARMUP, horizon, 0.1)
    seen = [schedule.factor(position) for position in (200, 400, 800, 1_000, 5_000)]
    assert seen == [0.2, 0.4, 0.8, 1.0, 1.0]


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"inverse_sqrt"}))  # which falls from a warm-up's end
def test_no_warm_up_starts_at_the_peak(shape: Shape) -> None:
    schedule = LrSchedule(shape, 0, HORIZON, 0.1)
    assert schedule.factor(0) == 1.0
    assert schedule.factor(1) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_jumps_and_no_way_up_after_the_peak(shape: Shape) -> None:
    values = [factor(shape, position) for position in range(0, HORIZON + 100)]
    # The steepest piece is warm-up, at 1 / 1000 per token.
    assert max(abs(b - a) for a, b in pairwise(values)) <= 1.000001e-3
    after = values[WARMUP:]
    assert all(b <= a for a, b in pairwise(after))


@pytest.mark.parametrize("shape", SHAPES)
def test_another_batch_does_not_bend_the_law(shape: Shape) -> None:
    """In tokens the law knows no batch: runs with batches of 100 and 400 tokens agree wherever both have been."""
    small = {step * 100: factor(shape, step * 100) for step in range(1, 121)}
    large = {step * 400: factor(shape, step * 400) for step in range(1, 31)}
    assert large.items() <= small.items()


def test_inverse_sqrt_falls_from_the_end_of_the_warm_up_to_its_floor() -> None:
    assert factor("inverse_sqrt", 4 * WARMUP) == pytest.approx(0.5)
    assert factor("inverse_sqrt", 9 * WARMUP) == pytest.approx(1 / 3)
    assert factor("inverse_sqrt", 10**6) == 0.1


def test_a_cooldown_of_a_given_length_and_form() -> None:
    for cooldown, half in (("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))):
        schedule = LrSchedule("wsd", WARMUP, HORIZON, 0.0, cooldown_tokens=4_000, cooldown=cooldown)  # type: ignore[arg-type]
        assert [schedule.factor(t) for t in (WARMUP, HORIZON - 4_000)] == pytest.approx([1.0, 1.0])
        assert schedule.factor(HORIZON - 2_000) == pytest.approx(half)
        assert schedule.factor(HORIZON) == 0.0


@pytest.mark.parametrize("position", [2_000, 7_777])
def test_a_cooldown_starts_from_anywhere_in_a_constant_phase(position: int) -> None:
    """The same settings but for where it ends: nothing before the branch differs."""
    constant, cooling = (
        LrSchedule(shape, WARMUP, position + 3_000, 0.0, cooldown_tokens=3_000)  # type: ignore[arg-type]
        for shape in ("constant", "wsd")
    )
    assert [cooling.factor(t) for t in range(0, position + 1, 77)] == [
        constant.factor(t) for t in range(0, position + 1, 77)
    ]
    assert cooling.factor(position + 1_500) == pytest.approx(0.5)
