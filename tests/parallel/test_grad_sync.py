"""Gradient synchronisation on gloo: sums, when they travel, how much travels, and ranks that have little or nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from disttrain.testing import RankPool

Settings = dict[str, Any]

JOBS = "tests.parallel.grad_sync_jobs:"
DDP, ZERO1, ZERO2 = ({"strategy": name} for name in ("ddp", "zero1", "zero2"))
FSDP = {"strategy": "fsdp", "grad_accumulation": "sharded"}
FSDP_LAST = {"strategy": "fsdp", "grad_accumulation": "unsharded"}
FSDP_KEPT = {**FSDP, "reshard_after_forward": False}
HSDP = {"strategy": "hsdp", "dp_replicate": 2}
HSDP_LAST = {**HSDP, "grad_accumulation": "unsharded"}


def name_of(settings: Settings) -> str:
    return " ".join(str(value) for value in settings.values())


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("settings", [DDP, ZERO1, FSDP, HSDP], ids=name_of)
def test_gradients_are_the_sum_over_ranks_not_the_mean(pool: RankPool, settings: Settings, world: int) -> None:
    if world == 1 and settings == HSDP:
        settings = {**HSDP, "dp_replicate": 1}
    for difference in pool.run(JOBS + "sums_of_gradients", world, settings=settings):
        assert difference < 1e-12


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        (DDP, "all_reduce", [False, False, True]),
        (ZERO1, "reduce_scatter", [False, False, True]),
        (ZERO2, "reduce_scatter", [True, True, True]),
        (ZERO2, "all_gather", [True, False, False]),
        (FSDP, "reduce_scatter", [True, True, True]),
        (FSDP_LAST, "reduce_scatter", [False, False, True]),
        (HSDP, "reduce_scatter", [True, True, True]),
        (HSDP, "all_reduce", [False, False, True]),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else None,
)
def test_gradients_travel_when_the_setting_says(
    pool: RankPool, settings: Settings, kind: str, expected: list[bool]
) -> None:
    counted = pool.run(JOBS + "unsynced_until_last", 4, settings=settings)[0]
    assert [calls.get(kind, 0) > 0 for calls in counted] == expected


@pytest.mark.parametrize(
    ("settings", "gathers", "reductions"),
    [
        (ZERO1, 3, 3),
        (ZERO2, 3, 9),
        (FSDP, 15, 9),
        (FSDP_LAST, 15, 3),
        (FSDP_KEPT, 9, 9),
        (HSDP, 15, 9),
        (HSDP_LAST, 15, 3),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else None,
)
def test_sharded_step_communicates_as_the_formula_says(
    pool: RankPool, settings: Settings, gathers: int, reductions: int
) -> None:
    """Three units, three microbatches, four ranks; hsdp as two copies of two shards. The root is gathered once each."""
    seen = pool.run(JOBS + "step_traffic", 4, settings=settings)[0]
    control = 2  # all-reduces: four counts (tokens, stops, savers, chunks); squared norms, loss and chunks
    hsdp = settings["strategy"] == "hsdp"
    assert seen["calls"]["all_gather"] == gathers
    assert seen["calls"]["reduce_scatter"] == reductions
    assert seen["calls"]["all_reduce"] == control + (3 if hsdp else 0)
    shards = 2 if hsdp else 4
    whole = 8 * sum(_padded_elements(shape, shards) for shape in seen["shapes"])
    root = 8 * sum(_padded_elements(shape, shards) for shape in seen["root_shapes"])
    assert seen["bytes"]["all_gather"] == (gathers // 3 * whole if gathers < 15 else 3 * (2 * whole - root))
    assert seen["bytes"]["reduce_scatter"] == reductions // 3 * whole
    assert seen["bytes"]["all_reduce"] == 8 * (6 + len(seen["shapes"])) + (whole // shards if hsdp else 0)


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_step_reduces_each_gradient_once(pool: RankPool, world: int) -> None:
    seen = pool.run(JOBS + "step_traffic", world, settings=DDP)[0]
    assert set(seen["calls"]) == {"all_reduce"}
    control = 8 * (6 + len(seen["shapes"]))  # counts of tokens, stops, savers, chunks; squared norms, loss, chunks
    assert seen["bytes"]["all_reduce"] - control == 8 * sum(math.prod(shape) for shape in seen["shapes"])


@pytest.mark.parametrize("settings", [DDP, ZERO1, ZERO2, FSDP, HSDP], ids=name_of)
@pytest.mark.parametrize(
    "shares",
    [
        pytest.param([[14, 3], [1, 9]], id="uneven"),
        pytest.param([[5, 0], [0, 1], [0, 0], [14, 14]], id="four ranks, one without data"),
    ],
)
def test_step_gradient_is_that_of_the_mean_over_all_tokens(
    pool: RankPool, settings: Settings, shares: list[list[int]]
) -> None:
    for seen in pool.run(JOBS + "gradients_by_share", len(shares), settings=settings, shares=shares):
        assert seen["valid_tokens"] == sum(map(sum, shares))
        assert seen["error"] < 1e-14
        assert seen["largest"] > 1e-3


def test_nobody_holds_gradients_beyond_their_step(pool: RankPool) -> None:
    """They would be there, beside the next ones, in the backward in which memory is highest."""
    assert pool.run(JOBS + "gradients_that_stay", 2) == [0, 0]


def test_ddp_accumulates_in_its_buckets(pool: RankPool) -> None:
    """Beside them, the gradients would be there twice, and be copied once a step."""
    assert pool.run(JOBS + "moved_gradients", 2) == [0, 0]


def test_a_global_batch_without_any_token_gives_zero_gradients(pool: RankPool) -> None:
    for seen in pool.run(JOBS + "no_tokens_at_all", 2):
        assert seen == 0.0


def _padded_elements(shape: tuple[int, ...], world: int) -> int:
    """FSDP2 pads dim 0 so that every rank has as many rows."""
    return math.ceil(shape[0] / world) * world * math.prod(shape[1:])
