"""What travels beside the computing on gloo: the next block's weights, and sums that nobody looks at yet."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.testing import RankPool

JOBS = "tests.parallel.beside_jobs:"
BF16 = {"param_dtype": "bf16"}


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "fsdp"])
def test_the_next_block_is_asked_for_before_one_computes(pool: RankPool, strategy: str) -> None:
    for seen in pool.run(JOBS + "order_of_gathers", 3, settings={"strategy": strategy}):
        assert seen == ["gather", "gather", "gather", "compute", "compute"]  # the root and two blocks


def test_sums_that_travel_beside_the_next_block_are_the_same_to_the_bit(pool: RankPool) -> None:
    for during, after, difference in pool.run(JOBS + "late_and_punctual", 3):
        assert during
        assert not after
        assert difference == 0


@pytest.mark.parametrize(
    ("settings", "dtype", "late"),
    [
        ({"strategy": "zero1"}, "float32", True),
        ({"strategy": "zero1"}, "float64", True),
        ({"strategy": "zero1", **BF16}, "float32", True),
        ({"strategy": "zero1", **BF16, "reduce_dtype": "bf16"}, "float32", False),
        ({"strategy": "zero1", **BF16}, "float64", False),
        ({"strategy": "zero2"}, "float32", False),
        ({"strategy": "fsdp"}, "float32", False),
        ({"strategy": "fsdp", "grad_accumulation": "unsharded"}, "float32", True),
        ({"strategy": "hsdp", "dp_replicate": 2, "grad_accumulation": "unsharded"}, "float32", False),
    ],
    ids=str,
)
def test_sums_are_late_only_where_nothing_is_added_to_them(
    pool: RankPool, settings: dict[str, Any], dtype: str, late: bool
) -> None:
    assert pool.run(JOBS + "may_be_late", 4, settings=settings, dtype=dtype) == [late] * 4


@pytest.mark.parametrize(
    "settings", [{"strategy": "zero1"}, {"strategy": "fsdp", "grad_accumulation": "unsharded"}], ids=str
)
def test_gradients_that_others_add_up_are_waited_for(pool: RankPool, settings: dict[str, Any]) -> None:
    """A loop of one's own, which calls backward twice and says nothing of microbatches."""
    assert max(pool.run(JOBS + "accumulated_by_hand", 3, settings=settings)) < 1e-12


def test_hooks_of_parameters_see_whole_sums(pool: RankPool) -> None:
    assert pool.run(JOBS + "seen_by_hooks", 3) == [0.0] * 3


@pytest.mark.parametrize("raises", [False, True], ids=["skipped", "raised"])
@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_weights_asked_for_early_and_not_used_are_not_kept(pool: RankPool, strategy: str, raises: bool) -> None:
    """A block that a forward did not come to had its old weights in the next one."""
    assert pool.run(JOBS + "left_pending", 3, settings={"strategy": strategy}, raises=raises) == [0.0] * 3
