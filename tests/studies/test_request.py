"""What a user may ask for: the plan that comes of it, and every refusal in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.errors import UserError
from disttrain.models.sharding_plan import GPT_PLAN
from disttrain.optim.param_groups import assign_groups
from disttrain.studies.cells import cell_config
from disttrain.studies.folder import ComparisonFolder
from disttrain.studies.optimizers import PRESETS, centre, check_optimizer
from disttrain.studies.plan import Cell, plan_from
from disttrain.studies.request import build_plan
from disttrain.studies.stages import rate_trials
from disttrain.train.build import build_gpt
from tests.studies.toys import base, plan, request

REFUSED = [
    ({"seeds": 1}, "--seeds 1: one seed has no spread"),
    ({"seeds": 0, "protocol": "smoke"}, "--seeds 0: there must be one at least"),
    ({"optimizers": "adamw,muno"}, "optimizer 'muno' is not known; did you mean muon?"),
    ({"optimizers": "adamw,my:"}, "optimizer 'my:': write it as package.Class or package.module:update"),
    ({"optimizers": "adamw"}, "a comparison needs two at least"),
    ({"optimizers": None}, "--optimizers: missing"),
    ({"optimizers": "adamw,adamw"}, "adamw is named twice"),
    ({"rate_factors": "1"}, "adamw: a grid of one rate is no search"),
    ({"decay_factors": "1"}, "muon: a grid of one weight decay is no search"),
    ({"rates": ("muon=1e-3,2e-3",)}, "rates to try: adamw 5, muon 2; every optimizer gets equally many trials"),
    ({"rates": ("lion=1,2,3,4,5",)}, "--rates: lion is not among --optimizers adamw,muon"),
    ({"rates": ("muon=1,2", "muon=1,2,3,4,5")}, "--rates: one optimizer is named twice"),
    ({"rate_factors": ""}, "--rate-factors '': must be numbers with commas between them"),
    ({"rates": ("muon",)}, "--rates 'muon': write it as OPTIMIZER=VALUE,VALUE"),
    ({"rates": ("muon=a,b",)}, "must be numbers with commas between them"),
    ({"rates": ("muon=0,1,2,3,4",)}, "muon: a rate of 0 trains nothing"),
    ({"rate_factors": "4,1"}, "must rise and not be below 0"),
    ({"tokens": 5120, "overrides": ("train.steps=10",)}, "budgets differ: --tokens 5,120, but train.steps=10 makes"),
    ({"tokens": 512}, "--tokens 512: a batch of 256 tokens gives 2.0 steps"),
    ({"batch_law": True}, "--tokens 10240: a batch of 4,096 tokens (16 times train.global_batch_tokens) gives 2.5"),
    ({"protocol": "big"}, "--protocol big: must be one of smoke, small, track3"),
    ({"search": "random"}, "--search random: must be rate-first or grid"),
    ({"protocol": "track3"}, "--protocol track3 counts steps to a validation loss: set --target"),
    ({"protocol": "track3", "target": float("nan")}, "--target nan: must be a loss above 0"),
    (
        {"batch_law": True, "tokens": 33_000},  # 129 steps, or 9 of the largest batch
        "budgets differ: --tokens 33,000 is 8.06 steps of 4,096 tokens, which train to the end of the last; "
        "set --tokens 36,864",
    ),
    ({"target": 3.0}, "--target is for --protocol track3"),
    ({"protocol": "track3", "target": 3.0, "overrides": ("model.d_model=32",)}, "track3 fixes data, model and batch"),
]


@pytest.mark.parametrize(("said", "problem"), REFUSED)
def test_refused_in_words(said: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as refused:
        build_plan(request(**{"optimizers": "adamw,muon", **said}), base())
    assert any(problem in line for line in refused.value.problems), refused.value.problems


def test_what_a_config_must_not_have() -> None:
    config = base(schedule={"horizon_steps": 80, "base_batch_tokens": 256})
    with pytest.raises(UserError) as refused:
        build_plan(request(), config)
    assert [line.split(":")[0] for line in refused.value.problems] == [
        "schedule.horizon_*",
        "schedule.base_batch_tokens",
    ]
    with pytest.raises(UserError, match="adamw: schedule: group no_decay warms up for 4,096 tokens"):
        build_plan(request(tokens=2048), base(schedule={"warmup_steps": None, "warmup_tokens": 4096, "shape": "wsd"}))


def test_trials_are_equal_and_runs_are_counted() -> None:
    found = plan("adamw,muon,lion")
    assert found.trials == 7
    assert (found.search_cells, found.final_cells) == (21, 9)
    assert (found.search_seed, found.seeds) == (7, (8, 9, 10))
    assert plan(search="grid").trials == 15
    assert plan(protocol="smoke", seeds=1).seeds == (8,)
    lines = list(found.lines())
    assert "30 runs: 21 to search, 9 to compare" in lines
    assert plan_from(json.loads(json.dumps(found.stored()))) == found


def test_searches_begin_where_the_configs_rate_is() -> None:
    default = base().optim
    assert centre("adamw", default) == (3e-4, 0.1)
    assert centre("adafactor", default) == (1e-2, 0.1)
    assert centre("mypkg.module:update", default) == (1e-3, 0.1)
    tuned = base(optim={"lr": 3e-3}).optim
    assert centre("muon", tuned)[0] == pytest.approx(3e-3)
    assert centre("momentum", tuned)[0] == pytest.approx(1.0)
    assert centre("lion", tuned)[0] == pytest.approx(6e-4)
    of_lion = base(optim={"preset": "lion", "lr": 6e-4}).optim
    assert centre("adamw", of_lion)[0] == pytest.approx(3e-3)


@pytest.mark.parametrize("name", [*PRESETS, "torch.optim.NAdam", "tests.studies.toys:own_update"])
def test_every_optimizer_makes_a_config(name: str) -> None:
    assert check_optimizer(name) is None
    other = "adamw" if name != "adamw" else "muon"
    found = plan(f"{other},{name}")
    config = cell_config(base(), found, rate_trials(found, found.rows[1])[0], "somewhere")
    groups = config.optim.resolved_groups
    assert {group.weight_decay for group in groups} == {0.0, found.rows[1].middle_decay}
    assert {group.lr for group in groups} == {found.rows[1].rates[0]}
    assert (config.train.tokens, config.train.steps, config.train.seed) == (10240, None, 7)


def test_cells_differ_in_the_optimizer_only() -> None:
    config = base(optim={"clip_norm": 0.5, "betas": [0.8, 0.9], "preset": "lion"}, schedule={"shape": "cosine"})
    found = build_plan(request("adamw,schedule_free_adamw"), config)
    ours, free = (cell_config(config, found, rate_trials(found, row)[1], "x") for row in found.rows)
    assert ours.optim.clip_norm == free.optim.clip_norm == 0.5
    assert ours.optim.betas is None  # those of another optimizer than its own would be no tuning
    assert (ours.schedule.shape, free.schedule.shape) == ("cosine", "constant")
    assert ours.model_dump(exclude={"optim", "run", "schedule"}) == free.model_dump(
        exclude={"optim", "run", "schedule"}
    )


def test_batch_law_rows() -> None:
    config = base(train={"steps": 400})
    found = build_plan(request(None, batch_law=True), config)
    labels = [row.label for row in found.rows]
    assert labels[:3] == ["adamw", "adamw 4B none", "adamw 4B sqrt"]
    assert labels[5:] == ["adamw 16B none", "adamw 16B sqrt", "adamw 16B linear"]  # 1 - 16 (1 - 0.9) is no beta
    assert found.search_cells == 7
    large = cell_config(config, found, Cell("adamw 16B sqrt", 1e-3, 0.1, 8), "x")
    assert (large.train.global_batch_tokens, large.train.tokens) == (4096, 102_400)
    assert (large.schedule.base_batch_tokens, large.schedule.batch_lr_rule) == (256, "sqrt")
    assert large.schedule.matrix_lr_rule == "sqrt"
    assert (large.schedule.warmup_steps, large.schedule.warmup_tokens) == (None, 1024)
    small = cell_config(config, found, Cell("adamw", 1e-3, 0.1, 8), "x")
    assert small.schedule.warmup_steps == 4


def test_a_larger_batch_warms_up_and_cools_down_over_as_many_tokens() -> None:
    """Those of a run over the budget, however short the config's own run is."""
    config = base(train={"steps": 40}, schedule={"shape": "wsd", "warmup_steps": None, "cooldown_steps": 48})
    found = build_plan(request(None, batch_law=True, tokens=102_400), config)
    (of_small, of_large) = (
        run.lr_schedules(run.train.batches())[0]
        for run in (cell_config(config, found, Cell(label, 1e-3, 0.1, 8), "x") for label in ("adamw", "adamw 16B sqrt"))
    )
    assert of_small == of_large
    assert (of_large.warmup_tokens, of_large.cooldown_tokens) == (25_600, 48 * 256)


def test_a_folder_may_grow_and_nothing_else(tmp_path: Path) -> None:
    folder = ComparisonFolder(tmp_path / "there")
    before = plan(tokens=5120)
    folder.check(before)
    folder.write_plan(before, "disttrain compare", 12.0)
    folder.check(plan("adamw,lion", tokens=7680))  # nothing was trained by what was only looked at
    (tmp_path / "there" / "cells").mkdir()
    folder.check(plan("adamw,muon,lion", tokens=5120, seeds=5, rate_factors="0.25,0.5,1,2,4,8"))
    for other, problem in (
        (plan(tokens=7680), "budgets differ: --tokens was 5,120, is 7,680"),
        (plan("adamw,lion", tokens=5120), "muon was planned and is gone"),
        (plan("muon,adamw", tokens=5120), "the baseline was adamw, is muon"),
        (plan(tokens=5120, seeds=2), "seeds 10 were planned and are gone"),
        (plan(tokens=5120, rate_factors="0.5,1,2"), "adamw: rates 7.5e-05, 0.0012 were planned and are gone"),
        (build_plan(request(tokens=5120), base(model={"d_model": 32})), "model.d_model was 16, is 32"),
        (build_plan(request(tokens=5120), base(optim={"clip_norm": 2.0})), "optim.clip_norm was 1.0, is 2.0"),
    ):
        with pytest.raises(UserError) as refused:
            folder.check(other)
        assert problem in refused.value.problems
        assert "holds another comparison" in refused.value.problems[-1]


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.tex and no plan\.json"):
        ComparisonFolder(tmp_path).check(plan())
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(UserError, match="is no plan of a comparison"):
        ComparisonFolder(tmp_path).check(plan())


@pytest.mark.parametrize("name", ["torch.optim.NAdam", "tests.studies.toys:own_update"])
@pytest.mark.parametrize("model", [{}, {"bias": False}, {"tie_embeddings": False, "norm": "rmsnorm"}])
def test_groups_of_own_optimizers_fit_every_model(name: str, model: dict[str, Any]) -> None:
    """Every rule matches, and what decays is what decays under a preset."""
    config = base(model=model)
    found = build_plan(request(f"muon,{name}"), config)
    owned = []
    for row in found.rows:
        optim = cell_config(config, found, rate_trials(found, row)[0], "x").optim
        gpt = build_gpt(config.model.model_copy(update={"vocab_size": 257}), 32, torch.device("cpu"))
        groups = assign_groups(gpt.named_parameters(), optim.resolved_groups, GPT_PLAN.roles, not optim.groups)
        owned.append({name for group, members in groups if group.weight_decay for name in members})
    assert owned[0] == owned[1] != set()
