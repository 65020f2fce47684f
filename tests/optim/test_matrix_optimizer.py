"""Optimizers that need whole matrices: on every layout what one process computes, with the traffic of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from disttrain.config import OptimConfig
from disttrain.errors import UserError
from disttrain.models import GPT, GPT_PLAN
from disttrain.optim import build_optimizer, matrix_optimizer
from disttrain.testing import RankPool
from disttrain.testing.matrix_parity import ALGORITHMS, CASES, LAYOUTS, WORLDS, layouts
from disttrain.testing.optimizer_parity import SHAPES, SYNTHETIC_TOLERANCE, TRAINING_TOLERANCE
from disttrain.testing.parity import MODELS
from disttrain.testing.pool import JobError
from tests.optim.matrix_jobs import CASES_OF_BITS, STACK

PARITY = "disttrain.testing.matrix_parity:"
JOBS = "tests.optim.matrix_jobs:"
CELLS = [(world, layout) for world in WORLDS for layout in layouts(world)]


@pytest.mark.parametrize(("world", "layout"), CELLS)
def test_drawn_gradients(pool: RankPool, world: int, layout: str) -> None:
    errors = pool.run(PARITY + "synthetic_job", world, 120, device="cpu", layout=layout)[0]
    assert set(errors) == set(CASES)
    assert {name: error for name, error in errors.items() if not error <= SYNTHETIC_TOLERANCE} == {}


# `disttrain verify` has all of them.
@pytest.mark.parametrize(("world", "layout"), [*((4, name) for name in LAYOUTS), (2, "ddp"), (3, "fsdp"), (8, "fsdp")])
def test_training(pool: RankPool, world: int, layout: str) -> None:
    errors = pool.run(PARITY + "training_job", world, 200, device="cpu", layout=layout)[0]
    assert set(errors) == set(CASES)
    assert {name: error for name, error in errors.items() if not error <= TRAINING_TOLERANCE} == {}


def test_not_a_bit_differs_from_one_process(pool: RankPool) -> None:
    """fp32, one matrix at a time: fewer matrices than ranks, one-row matrices, rows that do not divide. What is rounded
    to travel in bf16 is rounded everywhere, also where it does not travel."""
    alone = pool.run(JOBS + "bits", 1, layout="ddp", cases=[*CASES_OF_BITS])[0]
    assert len(alone) == len(CASES_OF_BITS) * len(SHAPES)
    for world, layout in CELLS:
        for seen in pool.run(JOBS + "bits", world, layout=layout, cases=[*CASES_OF_BITS]):
            assert {name for name in alone if not torch.equal(seen[name], alone[name])} == set(), (world, layout)


def test_what_is_computed_in_bf16_may_travel_in_bf16(pool: RankPool) -> None:
    cases = [f"muon (computed in bf16, {wire} on the wire)" for wire in ("auto", "parameter")]
    seen = pool.run(JOBS + "bits", 3, layout="fsdp", cases=cases)[0]
    assert all(torch.equal(seen[f"{cases[0]} {name}"], seen[f"{cases[1]} {name}"]) for name in SHAPES)
    assert not torch.equal(
        seen[f"{cases[0]} square"], pool.run(JOBS + "bits", 1, layout="ddp", cases=["muon"])[0]["muon square"]
    )


@pytest.mark.parametrize("wire", ["parameter", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bytes_sent_are_the_plans(pool: RankPool, layout: str, wire: str) -> None:
    ranks = pool.run(JOBS + "traffic", 4, layout=layout, wire=wire)
    assert [sent for sent, *_ in ranks] == [planned for _, planned, *_ in ranks]
    assert sum(sent for sent, *_ in ranks) == ranks[0][2]
    shards, owners = {"ddp": (1, 4), "ddp replicate": (1, 1), "hsdp": (2, 1), "hsdp spread": (2, 2)}.get(layout, (4, 1))
    # Two all-to-alls, and a broadcast from each copy that has something for this process's shard.
    expected = 2 * (shards > 1)
    assert all(expected <= calls <= expected + owners * (owners > 1) for *_, calls in ranks)
    assert ranks[0][2] == 0 if layout == "ddp replicate" else ranks[0][2] > 0


ROWS: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Shard(1), Shard(0)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 2), [Replicate(), Shard(1)]),
    ((2, 2), [Shard(0), Replicate()]),
    ((2, 2), [Replicate(), Replicate()]),
    ((4,), [Replicate()]),
]


@pytest.mark.parametrize("replicas", ["replicate", "spread"])
@pytest.mark.parametrize(("mesh", "placements"), ROWS, ids=str)
def test_any_placement_and_many_buckets(
    pool: RankPool, mesh: tuple[int, ...], placements: list[Placement], replicas: str
) -> None:
    """Tensor parallelism has no case of its own, and buckets in flight do not meet."""
    # torch itself refuses to cut other lengths so.
    strided = isinstance(placements[0], _StridedShard)
    exchange: dict[str, Any] = {"bucket_bytes": 8, "replicas": replicas, "rows": 4 if strided else 1}
    alone, _ = pool.run(JOBS + "stacked", 1, mesh_shape=(), placements=[], **exchange)[0]
    for seen, buckets in pool.run(JOBS + "stacked", 4, mesh_shape=mesh, placements=placements, **exchange):
        assert buckets >= 3
        assert max((seen[name] - alone[name]).abs().max().item() for name in STACK) < 1e-12


@pytest.mark.parametrize(("mesh", "placements"), ROWS[:7], ids=str)
@pytest.mark.parametrize("rows", [16, 18, 5])
def test_every_rank_knows_the_regions_of_the_others(
    pool: RankPool, mesh: tuple[int, ...], placements: list[Placement], rows: int
) -> None:
    if isinstance(placements[0], _StridedShard):
        rows = 4 * rows
    assert all(pool.run(JOBS + "regions", 4, mesh_shape=mesh, placements=placements, rows=rows))


@pytest.mark.parametrize("ranks", [[0], [0, 1, 2, 3]])
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp spread"])
def test_a_missing_gradient_is_a_gradient_of_zero(pool: RankPool, layout: str, ranks: list[int]) -> None:
    given = pool.run(JOBS + "missing", 4, layout=layout, ranks=[])[0]
    for seen in pool.run(JOBS + "missing", 4, layout=layout, ranks=ranks):
        assert all(torch.equal(seen[name], weight) for name, weight in given.items())


@pytest.mark.parametrize("mistake", ["one owner off by 1e-9", "regions in another order"])
def test_mistakes_turn_cells_red(pool: RankPool, mistake: str) -> None:
    errors = pool.run(JOBS + "spoilt", 2, mistake=mistake)[0]
    assert {name for name, error in errors.items() if not error <= SYNTHETIC_TOLERANCE} == set(CASES)


def test_plans_that_differ_are_an_error_and_not_a_wait(pool: RankPool) -> None:
    with pytest.raises(JobError, match="the plan for exchanging matrices differs: rank 0 has another than rank 1;"):
        pool.run(JOBS + "differing_plans", 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_are_with_one_owner(pool: RankPool, layout: str) -> None:
    """All see the same entries; of a matrix's factors one process holds all elements, and the others none."""
    ranks = pool.run(JOBS + "owner_state", 4, layout=layout)
    copies = {"hsdp": 2, "ddp replicate": 4}.get(layout, 1)
    factors = [name for name in ranks[0] if not name.endswith(".step")]
    assert len(factors) == 5 * 6
    for name in factors:
        shapes, held = zip(*(rank[name] for rank in ranks), strict=True)
        assert len(set(shapes)) == 1
        whole = torch.Size(shapes[0]).numel()
        assert sorted(held) == [0] * (4 - copies) + [whole] * copies


def test_types_and_layouts_have_plans_of_their_own(pool: RankPool) -> None:
    assert pool.run(JOBS + "of_unlike_types", 2) == [3, 3]


def test_the_preset_takes_the_hidden_matrices() -> None:
    gpt = GPT(MODELS["gpt2"], 8)
    optimizer = build_optimizer(gpt, OptimConfig(preset="muon", lr=1e-3), GPT_PLAN)
    owners = {name: group.algorithm for group, names in optimizer.groups for name in names}
    assert {name for name, owner in owners.items() if owner == "muon"} == {
        f"blocks.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "mlp.up", "mlp.down")
    }
    assert set(owners.values()) == {"muon", "adamw"}
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_no_hidden_matrix_is_refused(algorithm: str) -> None:
    optim = {"groups": [{"name": "all", "match": [".*"], "algorithm": algorithm}]}
    with pytest.raises(UserError) as raised:
        build_optimizer(GPT(MODELS["gpt2"], 8), OptimConfig.model_validate(optim), GPT_PLAN)
    vectors, tables = raised.value.problems
    assert f"group all: {algorithm} takes matrices only, not blocks.0.attention_norm.weight (10), " in vectors
    assert "wte.weight, wpe.weight is a table" in tables
    assert all("match = ['role:matrices'] takes the hidden matrices" in problem for problem in (vectors, tables))


def test_alone_without_any_process_group() -> None:
    weight = nn.Parameter(torch.eye(3, dtype=torch.float64))
    optimizer = matrix_optimizer("soap", [("weight", weight)], lr=0.1, weight_decay=0.0)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert not torch.equal(weight.detach(), torch.eye(3, dtype=torch.float64))
    assert "1 matrix (9 elements) over 1 shard" in optimizer.describe()[0]


def test_copies_say_why_they_share_the_computation(pool: RankPool) -> None:
    for bandwidth, shares in ((1e12, True), (1.0, False)):
        optim = OptimConfig.model_validate({"preset": "muon", "exchange": {"bytes_per_second": bandwidth}})
        lines, plan = pool.run(JOBS + "gpt_plan", 4, strategy={"strategy": "hsdp", "dp_replicate": 2}, optim=optim)[0]
        assert plan.spread is shares
        assert f"copies of the model {'share' if shares else 'do not share'} the computation" in lines[1]


def test_plans_are_compared_over_the_whole_grid(pool: RankPool) -> None:
    """Ranks of a row that agree must hear of the row that does not; and the algorithm is part of a plan."""
    for said in pool.run(JOBS + "differing_on_a_grid", 4):
        assert said.startswith("the plan for exchanging matrices differs: rank 0 has another than rank 1;")


@pytest.mark.parametrize("algorithm", ["muon", "normuon", "soap"])
def test_torchs_state_dict_goes_into_the_owners_state(pool: RankPool, algorithm: str) -> None:
    for distance, moved in pool.run(JOBS + "reloaded", 2, algorithm=algorithm):
        assert (distance, moved) == (0, 0)


def test_a_gradient_that_is_a_partial_sum_is_summed(pool: RankPool) -> None:
    assert all(pool.run(JOBS + "sums_left_undone", 2))


def test_frozen_parameters_stay_and_what_is_not_an_optimizers_is_refused() -> None:
    weight, frozen = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3), requires_grad=False)
    named = [("weight", weight), ("frozen", frozen)]
    optimizer = matrix_optimizer("muon", named, lr=0.1)
    assert optimizer.step(lambda: 3) == 3
    assert torch.equal(frozen, torch.eye(3))
    assert not torch.equal(weight, torch.eye(3))
    with pytest.raises(UserError, match="give it all of them at the start"):
        optimizer.add_param_group({"params": [frozen]})
    for wrong, said in (
        ({"algorithm": "adamw"}, "adamw: works on elements"),
        ({"algorithm": "muonn"}, "muonn: algorithm: "),
        ({"algorithm": "muon", "clip": 1.0}, "an optimizer does not clip"),
        ({"algorithm": "muon", "momentun": 0.9}, "muon: momentun: "),
    ):
        with pytest.raises(UserError, match=said):
            matrix_optimizer(named_parameters=named, lr=0.1, **wrong)  # type: ignore[arg-type]
