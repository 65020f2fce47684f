"""Every trainable parameter in exactly one group, and errors that name parameters."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from disttrain.config import ModelConfig, OptimConfig
from disttrain.errors import UserError
from disttrain.models import GPT, GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.optim.param_groups import assign_groups

CONFIG = ModelConfig(n_layers=2, d_model=10, n_heads=5, n_kv_heads=1, d_ff=13, vocab_size=53, qk_norm=True)


def gpt(**settings: Any) -> GPT:
    return GPT(CONFIG.model_copy(update=settings), 5)


def owners(model: nn.Module, *groups: dict[str, Any]) -> dict[str, list[str]]:
    config = OptimConfig.model_validate({"groups": [{"algorithm": "adamw", **group} for group in groups]})
    assigned = assign_groups(model.named_parameters(), config.resolved_groups, GPT_PLAN.roles, not groups)
    return {group.name: list(members) for group, members in assigned}


@pytest.mark.parametrize("tie", [True, False])
def test_a_preset_decays_matrices_and_nothing_else(tie: bool) -> None:
    model = gpt(tie_embeddings=tie)
    members = owners(model)
    assert sorted(members["decay"] + members["no_decay"]) == sorted(name for name, _ in model.named_parameters())
    linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(members["decay"]) == sorted(name for name in linear if name != "head.weight" or not tie)
    groups = {group["name"]: group for group in build_optimizer(model, OptimConfig(), GPT_PLAN).param_groups}
    assert (groups["decay"]["weight_decay"], groups["no_decay"]["weight_decay"]) == (0.1, 0.0)


def test_a_presets_empty_group_is_left_out() -> None:
    assert [*owners(nn.Linear(2, 2, bias=False))] == ["decay"]


def test_frozen_parameters_are_in_none() -> None:
    model = gpt()
    model.wte.weight.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    held = {id(p) for group in build_optimizer(model, OptimConfig(), GPT_PLAN).param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if not name.startswith(("wte", "blocks.0."))}


def test_the_first_match_wins() -> None:
    members = owners(
        gpt(),
        {"name": "first", "match": [r"^blocks\.0\."]},
        {"name": "matrices", "match": ["role:matrices", "^wte"]},
        {"name": "rest", "match": [".*"]},
    )
    assert all(name.startswith("blocks.0.") for name in members["first"])
    assert "blocks.0.mlp.up.weight" in members["first"]
    assert "blocks.1.mlp.up.weight" in members["matrices"]
    assert "wte.weight" in members["matrices"]
    assert not set(members["rest"]) & {*members["first"], *members["matrices"]}


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            [{"name": "a", "match": ["mlq"]}, {"name": "b", "match": [".*"]}],
            ["group a: 'mlq' matches none of the parameters: wte.weight, wpe.weight, "],
        ),
        (
            [{"name": "a", "match": ["mlp"]}],
            ["no group matches wte.weight, wpe.weight, blocks.0.attention_norm.weight", "match = ['.*']"],
        ),
        (
            [{"name": "all", "match": [".*"]}, {"name": "late", "match": ["mlp"]}],
            ["group late: owns nothing: all before it took all 12 parameters", "move it up or take it out"],
        ),
        (
            [{"name": "a", "match": ["role:matrixes"]}, {"name": "b", "match": [".*"]}],
            ["group a: there is no role:matrixes; the model has role:embeddings, role:head"],
        ),
        (
            [{"name": "a", "match": ["nowhere"]}, {"name": "b", "match": ["^wte"]}],
            ["group a: 'nowhere' matches none", "no group matches wpe.weight"],
        ),
    ],
)
def test_rules_that_do_not_fit_are_told_with_names(groups: list[dict[str, Any]], said: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        owners(gpt(), *groups)
    text = str(raised.value)
    for part in said:
        assert part in text
