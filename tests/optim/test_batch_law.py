"""What a changed batch does to groups of every kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from disttrain.config import OptimConfig
from disttrain.config.algorithms import ALGORITHMS
from disttrain.config.schedule import GroupSchedule, ScheduleConfig
from disttrain.errors import UserError
from disttrain.models import GPT_PLAN
from disttrain.optim import OptimizerSet, build_optimizer
from disttrain.optim.batch_law import BatchLaw, GroupLaw, group_rule
from disttrain.schedule import LrSchedule
from disttrain.testing.parity import MODELS
from disttrain.train.build import build_gpt

RULES = ("sqrt_full", "sqrt_full", "linear", "sqrt")
CONSTANT = LrSchedule("constant", 0, 1000, 1.0)


def section(algorithm: str) -> Any:
    return ALGORITHMS[algorithm].model_validate({"name": "g", "match": (".*",), "algorithm": algorithm})


def law(groups: list[dict[str, Any]], sizes: tuple[int, ...] = (), **schedule: Any) -> tuple[BatchLaw, OptimizerSet]:
    gpt = build_gpt(MODELS["modern"], 8, torch.device("cpu"))
    config = ScheduleConfig.model_validate({"base_batch_tokens": 100, **schedule})
    optimizer = build_optimizer(gpt, OptimConfig.model_validate({"groups": groups}), GPT_PLAN)
    laws = [GroupLaw(CONSTANT, group_rule(g["config"], g["config"].schedule, config)) for g in optimizer.param_groups]
    return BatchLaw(optimizer, laws, config, sizes), optimizer


def test_the_rule_of_each_algorithm() -> None:
    for shared, adam, lion in (
        ("sqrt", "sqrt", "sqrt"),
        ("sqrt_full", "sqrt_full", "sqrt"),
        ("linear", "linear", "linear"),
    ):
        config = ScheduleConfig(batch_lr_rule=shared, base_batch_tokens=100)  # type: ignore[arg-type]
        rules = {name: group_rule(section(name), None, config) for name in ALGORITHMS}
        assert {rules[name] for name in ("adam", "adamw", "rmsprop", "ademamix")} == {adam}
        assert {rules[name] for name in ("lion", "adafactor", "schedule_free_adamw")} == {lion}
        assert {rules[name] for name in ("sgd", "momentum", "nesterov")} == {"linear"}
        assert {rules[name] for name in ("muon", "normuon", "soap", "shampoo")} == {"sqrt"}
    none = ScheduleConfig(base_batch_tokens=100, batch_lr_rule="none")
    assert {group_rule(section(name), None, none) for name in ALGORITHMS} == {"none"}
    own = GroupSchedule(batch_lr_rule="sqrt_full")
    assert group_rule(section("adamw"), own, none) == "sqrt_full"
    with pytest.raises(UserError, match="'sqrt_full' is derived for Adam and its kin, not for muon"):
        group_rule(section("muon"), own, none)


def test_torchs_groups_get_what_the_rule_says_and_go_back() -> None:
    groups = [
        {"name": "a", "match": ["wq"], "algorithm": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8},
        {"name": "b", "match": ["wk"], "algorithm": "rmsprop", "lr": 1e-3, "alpha": 0.99, "weight_decay": 0.0},
        {"name": "c", "match": ["wv"], "algorithm": "sgd", "lr": 1e-2},
        {"name": "d", "match": [".*"], "algorithm": "lion", "lr": 1e-4, "weight_decay": 0.3},
    ]
    rules, optimizer = law(groups, batch_lr_rule="sqrt_full", keep_decay_timescale=True)
    before = {g["name"]: {k: v for k, v in g.items() if k not in ("params", "config")} for g in optimizer.param_groups}
    notes = rules.follow(400)
    assert notes[0] == "batch of 400 tokens, 4 times the base of 100:"
    assert notes[1].startswith("group a: lr 0.001 -> 0.002, weight_decay 0.1 -> 0.2, eps 1e-08 -> 5e-09, ")
    assert notes[1].endswith("betas (0.9, 0.95) -> (0.6, 0.8) (sqrt_full)")
    now = {g["name"]: g for g in optimizer.param_groups}
    assert (now["a"]["betas"], now["a"]["eps"]) == (pytest.approx((0.6, 0.8)), 5e-9)
    assert now["a"]["weight_decay"] == now["a"]["config"].weight_decay == pytest.approx(0.2)
    assert (now["b"]["alpha"], now["b"]["weight_decay"]) == (pytest.approx(0.96), 0.0)
    assert now["c"]["weight_decay"] == before["c"]["weight_decay"]  # added to the gradient: no time scale
    assert now["d"]["config"].weight_decay == pytest.approx(0.6)
    assert rules.lr_factors(1, 400) == [2.0, 2.0, 4.0, 2.0]
    assert rules.follow(400) == []
    assert rules.follow(100)[1:] == [f"group {n}: as tuned ({r})" for n, r in zip("abcd", RULES, strict=True)]
    assert rules.follow(100) == []
    for group in optimizer.param_groups:
        assert {k: v for k, v in group.items() if k in before[group["name"]]} == before[group["name"]]


def test_without_a_base_nothing_follows() -> None:
    rules, _ = law([{"name": "a", "match": [".*"]}], base_batch_tokens=None)
    assert rules.follow(400) == []
    assert rules.lr_factors(1, 400) == [1.0]


def test_a_batch_that_the_rule_breaks_at_is_refused_before_the_run() -> None:
    with pytest.raises(UserError, match=r"schedule\.batch_lr_rule: group a: sqrt_full: .* use the rule 'sqrt'"):
        law([{"name": "a", "match": [".*"]}], (100, 2000), batch_lr_rule="sqrt_full")


def test_schedule_and_rule_multiply() -> None:
    rules, _ = law([{"name": "a", "match": [".*"]}])
    rules.laws = [GroupLaw(LrSchedule("linear", 0, 1000, 0.0), "sqrt")]
    assert rules.lr_factors(500, 200) == [pytest.approx(0.5 * math.sqrt(2))]
