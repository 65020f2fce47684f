"""Who owns which parameter, told and stored; and whether the first update moved all of them."""

from __future__ import annotations

import json

import pytest
import torch

from disttrain.config import ModelConfig, OptimConfig
from disttrain.models import GPT, GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.optim.ownership import ownership, ownership_record, ownership_table
from disttrain.testing import RankPool

CONFIG = ModelConfig(n_layers=3, d_model=16, n_heads=2, vocab_size=53)
OPTIM = {
    "groups": [
        {
            "name": "matrices",
            "match": ["role:matrices"],
            "algorithm": "adafactor",
            "clip": {"kind": "norm", "limit": 0.5, "p": "inf"},
        },
        {"name": "rest", "match": [".*"], "algorithm": "adamw", "clip": {"kind": "value", "limit": 0.1}},
    ]
}


def test_every_parameter_has_a_row() -> None:
    model = GPT(CONFIG, 8)
    rows = ownership(build_optimizer(model, OptimConfig.model_validate(OPTIM), GPT_PLAN))
    assert sorted(row.parameter for row in rows) == sorted(name for name, _ in model.named_parameters())
    up = next(row for row in rows if row.parameter == "blocks.1.mlp.up.weight")
    assert (up.group, up.algorithm, up.optimizer_class) == (
        "matrices",
        "adafactor",
        "disttrain.optim.adafactor.Adafactor",
    )
    assert (up.shape, up.placement, up.clip) == ((64, 16), "whole", "inf-norm of group to 0.5")
    assert up.state_bytes == 4 * (64 + 16) + 8
    embedding = next(row for row in rows if row.parameter == "wte.weight")
    assert (embedding.clip, embedding.state_bytes) == ("elements to 0.1", 8 * 53 * 16 + 4)
    assert json.loads(json.dumps(ownership_record(rows)))[0]["group"] == "matrices"


def test_layers_are_one_line_of_the_table() -> None:
    rows = ownership(build_optimizer(GPT(CONFIG, 8), OptimConfig.model_validate(OPTIM), GPT_PLAN))
    lines = ownership_table(rows)
    assert [line.split(":")[0] for line in lines if line.startswith("group")] == ["group matrices", "group rest"]
    (up,) = [line.split() for line in lines if "mlp.up.weight" in line]
    assert up == ["blocks.*.mlp.up.weight", "3", "of", "64", "x", "16", "whole"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "fsdp"}, "rows over 4"),
        ({"strategy": "hsdp", "dp_replicate": 2}, "rows over 2, 2 copies"),
        ({"strategy": "ddp"}, "whole"),
    ],
)
def test_placements_are_told_and_state_is_counted_once(pool: RankPool, settings: dict[str, str], said: str) -> None:
    job = {"settings": settings}
    for rows in pool.run("tests.optim.ownership_jobs:rows", 4, **job):
        assert {row.placement for row in rows} == {said}
        assert {row.parameter: row.state_bytes for row in rows}["tall"] == 2 * 8 * 44 + 4


@pytest.mark.parametrize("world", [1, 4])
def test_what_did_not_move_is_named(pool: RankPool, world: int) -> None:
    for unmoved in pool.run("tests.optim.ownership_jobs:unmoved", world):
        assert unmoved == ["wide", "vector"]


def test_changes_that_cancel_out_are_seen(pool: RankPool) -> None:
    assert pool.run("tests.optim.ownership_jobs:cancelling", 2) == [["still"]] * 2
    assert torch.tensor([1.0, -1.0]).sum() == 0
