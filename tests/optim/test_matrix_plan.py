"""Plans of who computes which matrix, without processes."""

from __future__ import annotations

import random

import pytest
import torch

from disttrain.config.matrix_groups import Muon
from disttrain.errors import UserError
from disttrain.optim.matrix_optimizer import dist_in_software_pipeline
from disttrain.optim.matrix_plan import Box, MatrixPlan, MatrixUnit, build_plan, row_regions, spread_pays
from disttrain.optim.matrix_split import blocks_of, matrix_problems
from disttrain.optim.newton_schulz import newton_schulz_flops

SHAPES = [(6, 6), (9, 4), (1, 5), (40, 3), (7, 7), (7, 7), (2, 12)]


def unit(name: str, shape: tuple[int, int], shards: int) -> MatrixUnit:
    return MatrixUnit(name, shape, row_regions(shape, shards), newton_schulz_flops(*shape, 5))


def plan_of(shapes: list[tuple[int, int]], shards: int, replicas: int = 1, **settings: object) -> MatrixPlan:
    units = [unit(f"m{number}", shape, shards) for number, shape in enumerate(shapes)]
    return build_plan(units, shards=shards, replicas=replicas, **settings)  # type: ignore[arg-type]


def gpt2_small(shards: int, replicas: int = 1, **settings: object) -> MatrixPlan:
    layer = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    return plan_of(layer * 12, shards, replicas, **settings)


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9])
def test_rows_are_cut_as_torch_cuts_them(rows: int, shards: int) -> None:
    whole = torch.arange(rows * 2).reshape(rows, 2)
    cut = list(whole.chunk(shards))
    regions = row_regions((rows, 2), shards)
    assert [region.sizes[0] for region in regions] == [len(c) for c in cut] + [0] * (shards - len(cut))
    assert all(torch.equal(whole[region.slices], piece) for region, piece in zip(regions, cut, strict=False))


@pytest.mark.parametrize(
    ("shards", "replicas", "spread"),
    [(1, 1, False), (3, 1, False), (8, 1, False), (4, 2, False), (4, 2, True), (1, 4, True), (1, 4, False)],
)
def test_every_matrix_has_one_owner_and_the_bytes_are_those_of_the_formula(
    shards: int, replicas: int, spread: bool
) -> None:
    plan = plan_of(SHAPES, shards, replicas, spread=spread, element_bytes=2, bucket_bytes=64)
    assert sorted(u for bucket in plan.buckets for u in bucket.units) == list(range(len(SHAPES)))
    to_owner = 0
    for bucket in plan.buckets:
        for number, owner in zip(bucket.units, bucket.owners, strict=True):
            assert 0 <= owner < plan.workers
            to_owner += plan.units[number].elements - plan.units[number].regions[owner % shards].elements
    everything = sum(u.elements for u in plan.units)
    expected = 2 * to_owner * (1 if spread else replicas) + (replicas - 1) * everything * spread
    assert plan.total_sent_bytes == 2 * expected


def test_the_dearest_owner_of_gpt2_small() -> None:
    """At 64 and 256 there are fewer matrices than processes, and the dearest matrix is the limit: no plan is better."""
    for shards, bound in ((2, 1.0), (4, 1.0), (8, 1.10), (64, 1.6), (256, 6.4)):
        plan = gpt2_small(shards)
        print(plan.summary())
        assert plan.imbalance <= bound + 1e-9
    assert len(gpt2_small(8).buckets) > 1
    assert gpt2_small(4, replicas=2, spread=True).imbalance <= 1.10


def test_buckets_are_cut_by_what_a_process_sends() -> None:
    assert len(gpt2_small(8, bucket_bytes=1 << 40).buckets) == 1
    plan = gpt2_small(8, bucket_bytes=1)
    assert {len(bucket.units) for bucket in plan.buckets} == {8}
    assert plan.imbalance == 1.0
    # A rest that is too small for everybody joins the last bucket.
    assert [len(bucket.units) for bucket in plan_of([(4, 4)] * 13, 4, bucket_bytes=1).buckets] == [4, 4, 5]


def test_what_lies_on_one_process_stays_there() -> None:
    plan = plan_of([(1, 5)] * 4 + [(3, 3)], 4)
    [bucket] = plan.buckets
    owners = dict(zip(bucket.units, bucket.owners, strict=True))
    assert [owners[number] for number in range(4)] == [0] * 4
    spread = plan_of([(1, 5)] * 4, 4, 2, spread=True)
    assert sorted(spread.buckets[0].owners) == [0, 0, 4, 4]  # shard 0 of either copy


def test_plans_do_not_depend_on_anything_but_their_input() -> None:
    first, again = (plan_of(SHAPES, 4, 2, spread=True) for _ in range(2))
    assert first.digest == again.digest
    assert first.digest != plan_of(SHAPES, 4, 2).digest
    other = [MatrixUnit(u.name, u.shape, u.regions, u.flops, "another momentum") for u in first.units]
    assert build_plan(other, shards=4, replicas=2, spread=True).digest != first.digest


def test_regions_that_do_not_tile_are_refused() -> None:
    half = MatrixUnit("half", (4, 4), (Box((0, 0), (2, 4)), Box((0, 0), (0, 4))), 1.0)
    with pytest.raises(ValueError, match="half: 2 regions of 8 elements for 16"):
        build_plan([half], shards=2)


def test_a_table_shows_every_matrix_with_its_owner() -> None:
    plan = plan_of(SHAPES, 3)
    lines = plan.table()
    assert lines[0] == plan.summary()
    assert all(any(f"m{n} {rows}x{columns}" in line for line in lines[2:]) for n, (rows, columns) in enumerate(SHAPES))
    assert "7 matrices" in lines[0]
    assert "dearest owner" in lines[0]


def test_copies_share_where_computing_costs_more_than_sending() -> None:
    """Square matrices of width d: d > element_bytes flops / (30 bandwidth)."""
    flops, bandwidth = 4e14, 2.5e10
    for width, pays in ((1000, False), (1100, True)):
        square = MatrixUnit("square", (width, width), row_regions((width, width), 2), 30.0 * width**3)
        assert spread_pays([square], 2, 4, 2, flops, bandwidth)[0] is pays


@pytest.mark.parametrize("seed", range(20))
def test_boxes_meet_as_sets_do(seed: int) -> None:
    draw = random.Random(seed)
    first, second = (
        Box((draw.randrange(4), draw.randrange(4)), (draw.randrange(5), draw.randrange(5))) for _ in range(2)
    )
    ids = torch.arange(64).reshape(8, 8)
    both = set(ids[first.slices].flatten().tolist()) & set(ids[second.slices].flatten().tolist())
    meeting = first.within(second)
    assert set(ids[second.slices][meeting.slices].flatten().tolist()) == both
    assert meeting.elements == len(both)


def muon(**settings: object) -> Muon:
    return Muon.model_validate({"name": "m", "match": [".*"], **settings})


def test_fused_matrices_are_taken_apart() -> None:
    fused = muon(split=[{"match": "qkv", "sizes": [8, 2, 2]}, {"match": "c_attn", "sizes": 4, "dim": 1}])
    assert [box.sizes for box in blocks_of("a.qkv.weight", (12, 5), fused)] == [(8, 5), (2, 5), (2, 5)]
    assert [box.offsets for box in blocks_of("a.c_attn.weight", (5, 12), fused)] == [(0, 0), (0, 4), (0, 8)]
    assert blocks_of("a.up.weight", (5, 12), fused) == [Box((0, 0), (5, 12))]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [([8, 2], r"8 \+ 2 = 10, and a.qkv \(12 x 5\) has 12 rows"), (5, r"5 \+ 5 = 10"), (13, "13 = 13")],
)
def test_sizes_that_do_not_add_up_are_named(sizes: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        blocks_of("a.qkv", (12, 5), muon(split=[{"match": "qkv", "sizes": sizes}]))


def test_a_split_that_matches_nothing_and_what_is_no_matrix_are_named() -> None:
    config = muon(split=[{"match": "qvk", "sizes": 4}])
    split, vector = sorted(matrix_problems(config, {"a.qkv": (12, 5), "a.bias": (12,)}), reverse=True)
    assert split == "optim.groups: group m: split: 'qvk' matches none of its parameters: a.qkv, a.bias"
    assert vector.startswith("optim.groups: group m: muon takes matrices only, not a.bias (12): give them to another")


def test_one_bucket_travels_while_the_one_before_computes() -> None:
    happened: list[str] = []

    def task(number: int) -> object:
        for stage in ("send", "compute", "apply"):
            happened.append(f"{stage} {number}")
            if stage != "apply":
                yield

    dist_in_software_pipeline(task(number) for number in range(3))  # type: ignore[misc]
    assert happened == [
        *("send 0", "send 1", "compute 0", "send 2", "compute 1", "apply 0"),
        *("compute 2", "apply 1", "apply 2"),
    ]
