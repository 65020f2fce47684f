"""Gradient synchronisation on gloo: sums, when they travel, how much travels, and ranks that have little or nothing."""

from __future__ import annotations

import math

import pytest

from disttrain.testing import RankPool

JOBS = "tests.parallel.grad_sync_jobs:"
LAYOUTS = [("ddp", "unsharded"), ("fsdp", "sharded"), ("fsdp", "unsharded")]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_the_sum_over_ranks_not_the_mean(pool: RankPool, strategy: str, world: int) -> None:
    for difference in pool.run(JOBS + "sums_of_gradients", world, strategy=strategy):
        assert difference < 1e-12


@pytest.mark.parametrize(
    ("strategy", "grad_accumulation", "kind", "expected"),
    [
        ("ddp", "unsharded", "all_reduce", [False, False, True]),
        ("fsdp", "unsharded", "reduce_scatter", [False, False, True]),
        ("fsdp", "sharded", "reduce_scatter", [True, True, True]),
    ],
)
def test_gradients_travel_when_the_setting_says(
    pool: RankPool, strategy: str, grad_accumulation: str, kind: str, expected: list[bool]
) -> None:
    counted = pool.run(JOBS + "unsynced_until_last", 2, strategy=strategy, grad_accumulation=grad_accumulation)[0]
    assert [calls.get(kind, 0) > 0 for calls in counted] == expected


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("grad_accumulation", "reductions"), [("sharded", 9), ("unsharded", 3)])
def test_fsdp_step_gathers_and_scatters_as_the_formula_says(
    pool: RankPool, world: int, grad_accumulation: str, reductions: int
) -> None:
    """Three units, three microbatches: 18 all-gathers (forward and backward each), 9 or 3 reduce-scatters."""
    seen = pool.run(JOBS + "step_traffic", world, strategy="fsdp", grad_accumulation=grad_accumulation)[0]
    assert seen["calls"]["all_gather"] == 18
    assert seen["calls"]["reduce_scatter"] == reductions
    assert seen["calls"]["all_reduce"] == 2, "one for the token count, one for the norm"
    whole = 8 * sum(_padded_elements(shape, world) for shape in seen["shapes"])
    assert seen["bytes"]["all_gather"] == 2 * 3 * whole
    assert seen["bytes"]["reduce_scatter"] == reductions // 3 * whole


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_step_reduces_each_gradient_once(pool: RankPool, world: int) -> None:
    seen = pool.run(JOBS + "step_traffic", world, strategy="ddp", grad_accumulation="unsharded")[0]
    assert set(seen["calls"]) == {"all_reduce"}
    control = 2 * 8 + 8  # the token count with the stop flag, and the squared norm
    assert seen["bytes"]["all_reduce"] - control == 8 * sum(math.prod(shape) for shape in seen["shapes"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "shares",
    [
        pytest.param([[14, 3], [1, 9]], id="uneven"),
        pytest.param([[14, 3], [0, 0]], id="a rank without data"),
        pytest.param([[5, 0], [0, 1], [0, 0], [14, 14]], id="four ranks, one without data"),
    ],
)
def test_step_gradient_is_that_of_the_mean_over_all_tokens(
    pool: RankPool, strategy: str, shares: list[list[int]]
) -> None:
    for seen in pool.run(JOBS + "gradients_by_share", len(shares), strategy=strategy, shares=shares):
        assert seen["valid_tokens"] == sum(map(sum, shares))
        assert seen["error"] < 1e-14
        assert seen["largest"] > 1e-3


def test_a_global_batch_without_any_token_gives_zero_gradients(pool: RankPool) -> None:
    for seen in pool.run(JOBS + "no_tokens_at_all", 2):
        assert seen == 0.0


def _padded_elements(shape: tuple[int, ...], world: int) -> int:
    """FSDP2 pads dim 0 so that every rank has as many rows."""
    return math.ceil(shape[0] / world) * world * math.prod(shape[1:])
