"""Narrow types: the same arithmetic as in one process, and a loss scale that all ranks change alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disttrain.optim.loss_scale import GROWTH_STEPS, loss_scale_update
from disttrain.testing import RankPool

JOBS = "tests.parallel.memory_jobs:"
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "ddp"},
    {"strategy": "zero1"},
    {"strategy": "zero2"},
    {"strategy": "fsdp"},
    {"strategy": "hsdp", "dp_replicate": 2},
]
SUM_TOLERANCE = 1e-6
"""Only the order of fp32 sums over shares may differ."""


@pytest.mark.parametrize("param_dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("settings", STRATEGIES, ids=lambda s: s["strategy"])
def test_narrow_gradients_are_those_of_the_same_arithmetic_in_one_process(
    pool: RankPool, settings: dict[str, Any], param_dtype: str
) -> None:
    job = {"settings": {**settings, "param_dtype": param_dtype}}
    assert max(pool.run(JOBS + "mixed_precision_errors", 4, **job)) < SUM_TOLERANCE


@pytest.mark.parametrize("settings", STRATEGIES, ids=lambda s: s["strategy"])
def test_reducing_in_bf16_is_close_and_not_equal(pool: RankPool, settings: dict[str, Any]) -> None:
    job = {"settings": {**settings, "param_dtype": "bf16", "reduce_dtype": "bf16"}}
    error = max(pool.run(JOBS + "mixed_precision_errors", 4, **job))
    assert SUM_TOLERANCE < error < 3e-2


@pytest.mark.parametrize("settings", STRATEGIES, ids=lambda s: s["strategy"])
def test_an_overflow_on_one_rank_skips_the_same_step_everywhere(pool: RankPool, settings: dict[str, Any]) -> None:
    for first, second, third in pool.run(JOBS + "overflow_on_one_rank", 4, settings=settings):
        assert [first["skipped"], second["skipped"], third["skipped"]] == [0, 1, 0]
        for name, before in first["state"].items():
            if not name.startswith("loss_scale"):
                assert torch.equal(before, second["state"][name]), name
        assert [s["state"]["loss_scale.scale"].item() for s in (first, second, third)] == [2**16, 2**15, 2**15]
        assert [s["state"]["loss_scale.good_steps"].item() for s in (first, second, third)] == [1, 0, 1]
        changed = [n for n, t in third["state"].items() if not torch.equal(t, second["state"][n])]
        assert any(name.startswith("model.") for name in changed)
        assert all(tensor.isfinite().all() for tensor in third["state"].values())


def test_the_loss_scale_doubles_after_enough_good_steps_and_never_falls_below_one() -> None:
    one, good, bad = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)
    scale, steps = loss_scale_update(one * 8, torch.tensor(GROWTH_STEPS - 1.0), good)
    assert (scale.item(), steps.item()) == (16.0, 0.0)
    scale, steps = loss_scale_update(one * 8, torch.tensor(5.0), good)
    assert (scale.item(), steps.item()) == (8.0, 6.0)
    scale, steps = loss_scale_update(one, torch.tensor(5.0), bad)
    assert (scale.item(), steps.item()) == (1.0, 0.0)
