"""Lengths in steps and tokens, of a group and shared, as the schedule that they mean."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.config.schedule import GroupSchedule, ScheduleConfig, lr_schedule
from disttrain.schedule import BatchSchedule, LrSchedule, constant_batch, doubling_ramp

BATCHES = constant_batch(10, 10)


def schedule(own: dict[str, Any], shared: dict[str, Any], batches: BatchSchedule = BATCHES) -> LrSchedule:
    return lr_schedule(GroupSchedule(**own), ScheduleConfig(**shared), "cosine", batches, 1000)


def test_defaults() -> None:
    assert schedule({}, {}) == LrSchedule("cosine", 100 * 100, 1000 * 100, 0.1)
    assert lr_schedule(None, ScheduleConfig(), "constant", BATCHES, 30).warmup_tokens == 3000


def test_a_group_comes_before_the_shared_section_in_either_unit() -> None:
    shared = {"shape": "wsd", "warmup_steps": 5, "cooldown_steps": 50, "horizon_tokens": 90_000, "final_ratio": 0.0}
    assert schedule({}, shared) == LrSchedule("wsd", 500, 90_000, 0.0, 5_000)
    own = {"warmup_tokens": 7, "cooldown_tokens": 9, "cooldown": "sqrt", "final_ratio": 0.5, "horizon_steps": 10}
    assert schedule(own, shared) == LrSchedule("wsd", 7, 1_000, 0.5, 9, "sqrt")
    assert schedule({"shape": "linear", "warmup_steps": 0}, {"warmup_tokens": 7}).warmup_tokens == 0


def test_steps_are_those_of_the_ramp() -> None:
    ramp = doubling_ramp(1, 4, (100, 300), 10)  # steps of 10, 20 and 40 tokens
    made = schedule({}, {"warmup_steps": 15, "horizon_steps": 30, "cooldown_steps": 12}, ramp)
    assert (made.warmup_tokens, made.horizon_tokens) == (10 * 10 + 5 * 20, 10 * 10 + 10 * 20 + 10 * 40)
    assert made.cooldown_tokens == 10 * 40 + 2 * 20


def test_one_unit_at_a_time() -> None:
    with pytest.raises(ValueError, match="one of horizon_steps and horizon_tokens"):
        GroupSchedule(horizon_steps=1, horizon_tokens=1)
