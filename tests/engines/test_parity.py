"""The same twenty steps under every engine: unequal token counts, ranks without any, microbatches, two groups."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.optim.anomaly import Verdict
from disttrain.testing import RankPool
from disttrain.testing.parity import tensor_error

TOLERANCE = 1e-5
pytestmark = pytest.mark.timeout(300)


def case(engine: str, strategy: str, **sections: Any) -> dict[str, Any]:
    parallel = {"strategy": strategy} | sections.pop("parallel", {})
    return {"engine": engine, "parallel": parallel, **sections}


ENGINES = {
    "native ddp": case("native", "ddp"),
    "native fsdp": case("native", "fsdp"),
    "deepspeed stage 0": case("deepspeed", "ddp"),
    "deepspeed stage 1": case("deepspeed", "zero1"),
    "deepspeed stage 2": case("deepspeed", "zero2"),
    "deepspeed stage 3": case("deepspeed", "fsdp"),
    "accelerate ddp": case("accelerate", "ddp"),
    "accelerate fsdp": case("accelerate", "fsdp"),
}
"""The first is what the others are compared with."""


def compare(found: list[Any], tolerance: float = TOLERANCE) -> dict[str, dict[str, float]]:
    """The largest relative errors against the first case, over steps, and those beyond `tolerance`."""
    names = list(found[0])
    table = {}
    for name in names[1:]:
        losses = [[sum(rank[key][0][step][0] for rank in found) for step in range(20)] for key in (names[0], name)]
        norms = [[found[0][key][0][step][1] for step in range(20)] for key in (names[0], name)]
        expected, seen = found[0][names[0]][1], found[0][name][1]
        assert seen.keys() == expected.keys()
        table[name] = {
            "loss": max(abs(b / a - 1) for a, b in zip(*losses, strict=True)),
            "grad_norm": max(abs(b / a - 1) for a, b in zip(*norms, strict=True)),
            "parameters": max(tensor_error(key, seen[key], expected[key]) for key in expected),
        }
    return {name: row for name, row in table.items() if max(row.values()) > tolerance}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_engine_trains_the_same_run(engine_pool: RankPool, cache: Path, world: int) -> None:
    # DeepSpeed counts parameters from the start of a process: all ranks of a world must have had the same jobs.
    with nullcontext(engine_pool) if world == 2 else RankPool() as pool:
        found = pool.run("tests.engines.jobs:train", world, timeout_seconds=240, cache=cache, cases=ENGINES)
    assert compare(found) == {}
    clipped = [norm for _, norm in found[0]["native ddp"][0] if norm > 0.5]
    assert len(clipped) > 5
    classes = {name: result[2] for name, result in found[0].items()}
    assert classes["native ddp"] == ["torch.optim.adamw.AdamW"]
    assert classes["deepspeed stage 2"][0].endswith(
        "AdamW in deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
    )
    assert classes["accelerate fsdp"][0].endswith("AdamW in accelerate.optimizer.AcceleratedOptimizer")


GROUPS = {
    "clip_norm": 0.0,
    "groups": [
        {
            "name": "a",
            "match": ["role:matrices"],
            "algorithm": "lion",
            "lr": 1e-3,
            "clip": {"kind": "norm", "limit": 0.1},
        },
        {"name": "b", "match": [".*"], "algorithm": "adamw", "lr": 1e-2, "clip": {"kind": "value", "limit": 0.01}},
    ],
}
"""Two algorithms, clipped apart."""
MUON = {"preset": "muon", "lr": 1e-2, "max_update_ratio": 0.05}
AVERAGED = {"preset": "schedule_free_adamw", "lr": 1e-2}
SETS = {
    "groups": (GROUPS, "ddp", ["zero1", "zero2", "fsdp"], ["ddp", "fsdp"]),
    "whole matrices": (MUON, "ddp", ["ddp"], ["ddp"]),
    "cut matrices": (MUON, "fsdp", [], ["fsdp"]),
    "averaged weights": (AVERAGED, "ddp", ["zero2", "fsdp"], []),
}
"""What is optimized how, the native strategy to compare with, and those of the other engines."""


@pytest.mark.parametrize("name", SETS)
def test_our_optimizers_under_other_engines(engine_pool: RankPool, cache: Path, name: str) -> None:
    optim, native, deepspeed, accelerate = SETS[name]
    cases = {"native": case("native", native, optim=optim)}
    cases |= {f"deepspeed {strategy}": case("deepspeed", strategy, optim=optim) for strategy in deepspeed}
    cases |= {f"accelerate {strategy}": case("accelerate", strategy, optim=optim) for strategy in accelerate}
    found = engine_pool.run("tests.engines.jobs:train", 2, timeout_seconds=240, cache=cache, cases=cases)
    assert compare(found) == {}


def test_averaged_weights_are_evaluated(engine_pool: RankPool, cache: Path) -> None:
    """And training goes on at the others: DeepSpeed gathers small parameters once a step, and believes them new."""
    cases = {"native": case("native", "ddp", optim=AVERAGED)}
    cases |= {name: case("deepspeed", name, optim=AVERAGED) for name in ("ddp", "zero1", "zero2", "fsdp")}
    job = "tests.engines.jobs:evaluate_between"
    for rank in engine_pool.run(job, 2, timeout_seconds=240, cache=cache, cases=cases):
        assert rank == {name: pytest.approx(rank["native"], rel=TOLERANCE) for name in cases}


ZERO = [("deepspeed", strategy) for strategy in ("zero1", "zero2", "fsdp")]
needs_fp16 = pytest.mark.skipif(
    not (hasattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported") and torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    reason="DeepSpeed computes in fp16 only on processors with units for it",
)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "layouts"),
    [
        ("bf16", 1e-2, [*ZERO, ("accelerate", "fsdp")]),
        ("fp16", 2e-3, [("accelerate", "fsdp")]),
        pytest.param("fp16", 2e-3, ZERO, marks=needs_fp16),
    ],
    ids=["bf16", "fp16", "fp16 under ZeRO"],
)
def test_narrow_types(
    engine_pool: RankPool, cache: Path, dtype: str, tolerance: float, layouts: list[tuple[str, str]]
) -> None:
    parallel = {"param_dtype": dtype}
    cases = {" ".join(layout): case(*layout, parallel=parallel) for layout in [("native", "ddp"), *layouts]}
    found = engine_pool.run("tests.engines.jobs:train", 2, timeout_seconds=240, cache=cache, cases=cases)
    beyond = compare(found, tolerance)
    assert {name: row["loss"] for name, row in beyond.items() if row["loss"] > tolerance} == {}


def test_offloaded(engine_pool: RankPool, cache: Path) -> None:
    offload = {"offload_optimizer": "cpu"}
    cases = {"native": case("native", "ddp")}
    cases |= {f"stage {n + 1}": case("deepspeed", s, deepspeed=offload) for n, s in enumerate(("zero1", "zero2"))}
    both = offload | {"offload_parameters": "cpu"}
    cases["stage 3"] = case("deepspeed", "fsdp", deepspeed=both)
    found = engine_pool.run("tests.engines.jobs:train", 2, timeout_seconds=240, cache=cache, cases=cases)
    assert compare(found) == {}


def test_a_run_moves_between_engines(engine_pool: RankPool, cache: Path, tmp_path: Path) -> None:
    """AdamW's state too: the steps behind the move are those of the engine that made the checkpoint."""
    for first in ("native fsdp", "deepspeed stage 3"):
        others = [name for name in ENGINES if name not in (first, "native ddp")]
        cases = {name: ENGINES[name] for name in (first, *others)}
        folder = tmp_path / first.replace(" ", "-")
        found = engine_pool.run(
            "tests.engines.jobs:move", 2, timeout_seconds=240, cache=cache, folder=folder, cases=cases
        )
        for rank in found:
            for name in others:
                for seen, expected in zip(rank[name], rank[first], strict=True):
                    assert seen == pytest.approx(expected, rel=TOLERANCE, abs=1e-9), (first, name)


def test_a_rollback_passes_over_a_checkpoint(engine_pool: RankPool, cache: Path, tmp_path: Path) -> None:
    cases = {name: ENGINES[name] for name in ("deepspeed stage 2", "deepspeed stage 3", "accelerate fsdp")}
    job = "tests.engines.jobs:go_back"
    for rank in engine_pool.run(job, 2, timeout_seconds=240, cache=cache, folder=tmp_path, cases=cases):
        assert rank == dict.fromkeys(cases, (1, [True, False]))


def test_replicas_are_compared(engine_pool: RankPool, cache: Path) -> None:
    """The weights that DeepSpeed computes with, not the fp32 runs that ranks hold one of each."""
    cases = {name: ENGINES[name] for name in ("deepspeed stage 1", "deepspeed stage 2")}
    found = engine_pool.run("tests.engines.jobs:flip", 2, timeout_seconds=240, cache=cache, cases=cases)
    for name in cases:
        (good, spoilt), (also_good, other) = (rank[name] for rank in found)
        assert good == also_good
        assert [a == b for a, b in zip(spoilt, other, strict=True)] == [False] + [True] * (len(spoilt) - 1)


def test_a_bad_step_is_left_out(engine_pool: RankPool, cache: Path) -> None:
    cases = {name: ENGINES[name] for name in list(ENGINES)[2:]}
    found = engine_pool.run("tests.engines.jobs:skip", 2, timeout_seconds=240, cache=cache, cases=cases)
    good, bad = (Verdict.GOOD, 0.0, True), (Verdict.GRADIENT_NOT_FINITE, 1.0, False)
    for rank in found:
        assert all(seen == [good, bad, good] for seen in rank.values()), rank
