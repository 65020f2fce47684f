"""The global batch as a function of tokens: ramps, their steps, and what a resume with another batch makes of them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from disttrain.schedule import BatchSchedule, BatchStage, constant_batch, doubling_ramp, linear_ramp

LENGTH = 8
SCHEDULES = {
    "constant": constant_batch(6, LENGTH),
    "linear": linear_ramp(4, 19, 3_000, 5, LENGTH),
    "linear by ones": linear_ramp(1, 30, 700, 1, LENGTH),
    "doubling": doubling_ramp(3, 24, (100, 1_000, 1_001), LENGTH),
    "stages that a long step jumps over": BatchSchedule(tuple(BatchStage(t, 9 + t) for t in (0, 1, 2, 70, 75)), LENGTH),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_steps_and_tokens_follow_from_each_other(schedule: BatchSchedule) -> None:
    tokens = 0
    for step in range(400):
        assert schedule.tokens_after(step) == tokens
        assert schedule.steps_for(tokens) == step
        size = schedule.samples_at(tokens) * LENGTH
        assert {schedule.steps_for(tokens + part) for part in (1, size - 1, size)} == {step + 1}
        tokens += size
        assert schedule.samples_before(tokens) * LENGTH == size
    assert schedule.samples_at(10**12) == schedule.stages[-1].samples


def test_a_linear_ramp_stays_below_its_line_and_ends_on_it() -> None:
    ramp = linear_ramp(32, 512, 100_000, 32, LENGTH)
    for tokens in range(0, 120_000, 500):
        line = min(512, 32 + (512 - 32) * tokens / 100_000)
        assert line - 32 <= ramp.samples_at(tokens) <= line + 1e-9
    assert (ramp.samples_at(99_999), ramp.samples_at(100_000)) == (480, 512)
    assert [stage.samples for stage in linear_ramp(4, 19, 3_000, 5, LENGTH).stages] == [4, 9, 14, 19]


def test_doubling_at_given_tokens() -> None:
    ramp = doubling_ramp(3, 12, (100, 1_000), LENGTH)
    assert [ramp.samples_at(t) for t in (0, 99, 100, 999, 1_000, 10**9)] == [3, 3, 6, 6, 12, 12]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: linear_ramp(9, 4, 100, 1, LENGTH), "9 samples is not below the last of 4"),
        (lambda: doubling_ramp(3, 10, (100,), LENGTH), "3 samples doubled 1 times are 6, and the final batch has 10"),
        (lambda: BatchSchedule((BatchStage(0, 1), BatchStage(9, 2), BatchStage(5, 3)), LENGTH), "go forward"),
        (lambda: BatchSchedule((BatchStage(1, 1),), LENGTH), "begin at 0"),
        (lambda: BatchSchedule((BatchStage(0, 0),), LENGTH), "at least one sample"),
    ],
)
def test_ramps_that_lead_nowhere(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


def test_a_resumed_run_keeps_its_past() -> None:
    past = doubling_ramp(3, 24, (100, 1_000, 5_000), LENGTH)
    position = past.tokens_after(40)
    for following, ratio in ((constant_batch(7, LENGTH), Fraction(1)), (past, Fraction(4, 3)), (past, Fraction(1))):
        continued = past.continued(position, following, ratio)
        assert [continued.tokens_after(step) for step in range(41)] == [past.tokens_after(step) for step in range(41)]
        for tokens in (position, position + 500, 4_999, 5_000, 10**6):
            assert continued.samples_at(tokens) == following.samples_at(tokens) * ratio
    assert past.continued(position, past) == past
    with pytest.raises(ValueError, match="times 2/5 is no whole number"):
        past.continued(position, past, Fraction(2, 5))
