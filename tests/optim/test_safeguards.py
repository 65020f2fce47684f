"""Rules side by side, the limit on updates, QK-Clip at its limits, and what Muon makes of clipped gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from disttrain.config import ModelConfig, OptimConfig
from disttrain.config.clipping import AdaptiveClip, QKClipConfig
from disttrain.engines import UpdateResult
from disttrain.errors import UserError
from disttrain.models import GPT_PLAN
from disttrain.optim import (
    GradientClipper,
    GradientNorms,
    QKClip,
    build_optimizer,
    build_safeguards,
    dist_clip_gradients,
)
from disttrain.optim.clip import UnitClips
from disttrain.optim.clip_rules import AGCRule
from disttrain.optim.clip_units import assign_units
from disttrain.optim.qk_clip import qk_clip_scales
from disttrain.testing import RankPool
from disttrain.testing.optimizer_parity import SHAPES, STRATEGIES
from disttrain.testing.parity import MODELS
from disttrain.train.build import build_gpt
from disttrain.train.safeguard_metrics import SafeguardMetrics

JOBS = "tests.optim.clip_jobs:"
CPU = torch.device("cpu")


@pytest.mark.parametrize("world", [2, 4])
def test_all_rules_side_by_side_take_one_all_reduce(pool: RankPool, world: int) -> None:
    [alone] = pool.run(JOBS + "every_kind", 1)
    for gradients in pool.run(JOBS + "every_kind", world):
        for seen, expected in zip(gradients, alone, strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_update_is_longer_than_its_share(pool: RankPool, strategy: str) -> None:
    for ratios, (start, moved, after) in pool.run(JOBS + "limited", 4, strategy=strategy):
        for name, ratio in zip(SHAPES, ratios, strict=True):
            weight = torch.zeros_like(start[name]) if name == "zero" else start[name]
            norm = max(weight.norm().item(), 1e-3 * math.sqrt(weight.numel()))
            assert ratio == pytest.approx((moved[name] - weight).norm().item() / norm, rel=1e-12)
            if ratio > 0.05:
                assert (after[name] - weight).norm().item() == pytest.approx(0.05 * norm, rel=1e-12)
            else:
                assert torch.equal(after[name], moved[name])
        assert 0 < ratios[0] < 0.05 < ratios[4]


ATTENTION: dict[str, Any] = {"n_layers": 1, "d_ff": 20, "vocab_size": 53}
MODELS_WITH_HEADS = {
    "mha": ModelConfig(**ATTENTION, d_model=12, n_heads=3, position="rope", bias=False),
    "mha with biases": ModelConfig(**ATTENTION, d_model=12, n_heads=3),
    "gqa with biases": ModelConfig(**ATTENTION, d_model=20, n_heads=5, n_kv_heads=1),
    "gqa in groups": ModelConfig(**ATTENTION, d_model=24, n_heads=6, n_kv_heads=2, position="rope"),
}
QK = {"q_only": {"grouped": "q_only"}, "shared_k": {"grouped": "shared_k", "alpha": 0.3}}


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 2), ("fsdp", 4), ("hsdp", 4)])
@pytest.mark.parametrize("model", MODELS_WITH_HEADS.values(), ids=MODELS_WITH_HEADS)
def test_each_head_ends_at_its_own_limit_on_every_rank(
    pool: RankPool, model: ModelConfig, strategy: str, world: int
) -> None:
    for qk in QK.values():
        job: dict[str, Any] = {"settings": STRATEGIES[strategy], "model": model}
        unclipped = pool.run(JOBS + "qk_limits", world, **job, qk={**qk, "threshold": 1e9})
        largest = unclipped[0]["before"]
        threshold = largest.median().item()
        ranks = pool.run(JOBS + "qk_limits", world, **job, qk={**qk, "threshold": threshold})
        # Every rank saw other maxima, and none of them alone knew all of the largest.
        assert len({tuple(rank["own"].tolist()) for rank in ranks}) == world
        assert torch.equal(torch.stack([rank["own"] for rank in ranks]).amax(0), largest)
        for rank in ranks:
            expected = largest.clamp(max=threshold)
            torch.testing.assert_close(rank["after"], expected, rtol=1e-12, atol=0)
            assert (rank["scales"] < 1).sum() == (largest > threshold).sum() > 0
            for name, weight in rank["weights"].items():
                assert torch.equal(weight, ranks[0]["weights"][name])
                if model.kv_heads == model.n_heads or qk["grouped"] == "shared_k":
                    continue
                assert torch.equal(weight, unclipped[0]["weights"][name]) == (".wk." in name)


def test_watching_changes_nothing_under_any_memory_technique(pool: RankPool) -> None:
    [plain, other] = pool.run(JOBS + "watched", 2, settings={"strategy": "fsdp"})
    assert (plain["maxima"] >= math.log(7) - 1e-9).any()
    assert not torch.equal(plain["maxima"], other["maxima"])
    for settings in (
        {"strategy": "fsdp", "activation_checkpointing": "full"},
        {"strategy": "fsdp", "activation_checkpointing": "selective"},
        {"strategy": "ddp", "activation_checkpointing": "full", "compile": True},
    ):
        seen = pool.run(JOBS + "watched", 2, 200, settings=settings)[0]
        torch.testing.assert_close(seen["maxima"], plain["maxima"], rtol=1e-12, atol=0)
        torch.testing.assert_close(seen["loss"], plain["loss"], rtol=1e-12, atol=0)
        torch.testing.assert_close(seen["gradients"], plain["gradients"], rtol=1e-9, atol=1e-12)


MUON: dict[str, dict[str, Any]] = {
    "the default": {},
    "a limit far below every norm": {"clip_norm": 1e-4},
    "adaptive": {"clip": {"kind": "adaptive", "warmup_steps": 2}},
    "agc": {"clip": {"kind": "agc"}},
    "zclip": {"clip": {"kind": "zclip", "warmup_steps": 2}},
}


@pytest.mark.parametrize("clip", MUON.values(), ids=MUON)
def test_no_clipping_shortens_muons_step(pool: RankPool, clip: dict[str, Any]) -> None:
    """Clipping acts on gradients before the momentum, and the direction has no scale: a spike and a tight limit change
    what is averaged, never how far Muon goes. Clipped after Newton-Schulz, the step would lose most of its length."""
    for lengths in pool.run(JOBS + "muon_lengths", 2, clip=clip):
        assert len(lengths) == 12
        assert all(0.75 < length < 1.25 for length in lengths), lengths


def test_units_are_kinds_in_layers() -> None:
    names = [name for name, _ in build_gpt(MODELS["gpt2"], 8, torch.device("meta")).named_parameters()]
    units, _ = assign_units("all", names, AdaptiveClip(edge_importance=1.2), GPT_PLAN, {0, 1})
    assert {unit.name: unit.importance for unit in units} == {
        "embeddings": 1.25,
        **{f"norms_biases.{layer}": 1.2 for layer in (0, 1)},
        **{f"attention_qk.{layer}": 1.5 * 1.2 for layer in (0, 1)},
        **{f"attention_vo.{layer}": 1.2 for layer in (0, 1)},
        **{f"mlp.{layer}": 1.2 for layer in (0, 1)},
        "norms_biases": 1.0,
    }
    assert sorted(position for unit in units for position in unit.members) == list(range(len(names)))
    members = {unit.name: [names[position] for position in unit.members] for unit in units}
    assert members["attention_qk.1"] == ["blocks.1.attention.wq.weight", "blocks.1.attention.wk.weight"]


def clipper(optim: dict[str, Any], steps: int | None = 100) -> GradientClipper:
    gpt = build_gpt(MODELS["gpt2"], 8, CPU)
    optimizer = build_optimizer(gpt, OptimConfig.model_validate(optim), GPT_PLAN)
    return GradientClipper(optimizer.param_groups, optimizer.parameter_names, GPT_PLAN, steps)


SKIPS = [
    (["("], ValueError, "not a regular expression"),
    (["role:hed"], UserError, "clip.skip: there is no role:hed; the model has role:"),
]


@pytest.mark.parametrize(("skip", "kind", "words"), SKIPS)
def test_what_agc_should_skip_must_be_a_rule(skip: list[str], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        clipper({"clip": {"kind": "agc", "skip": skip}})


def test_agc_skips_by_any_rule() -> None:
    [first, second] = clipper({"clip": {"kind": "agc", "skip": ["(?:wte|final)", "role:mlp"]}}).rules
    assert isinstance(first, AGCRule)
    assert isinstance(second, AGCRule)
    assert len(first.skipped) == 3  # wte, and the final norm's weight and bias
    assert len(second.skipped) == 4
    with pytest.raises(UserError, match="agc skips parameters by name"):
        dist_clip_gradients(clipper({"clip": {"kind": "agc"}}).groups, torch.ones(()))


def test_a_run_of_one_step_has_a_schedule_too() -> None:
    assert [note.split(":")[0] for note in clipper({"preset": "muonclip"}, steps=1).notes()] == [
        "group matrices",
        "group no_decay",
    ]
    assert clipper({"preset": "muonclip"}, steps=101).notes() == []
    with pytest.raises(UserError, match="without the run's steps"):
        clipper({"preset": "muonclip"}, steps=None)


def test_what_diverges_is_told_when_it_begins() -> None:
    gpt = build_gpt(MODELS["gpt2"], 8, CPU)
    optim = OptimConfig.model_validate({"clip": {"kind": "zclip"}})
    optimizer = build_optimizer(gpt, optim, GPT_PLAN)
    guards = build_safeguards(gpt, optimizer, optim, GPT_PLAN, device=CPU, steps=10)
    metrics, told = SafeguardMetrics(optimizer, guards), []
    one, names = torch.ones(2, dtype=torch.float64), guards.clipper.unit_names
    assert names == ["no_decay.norm_of_all", "decay.norm_of_all"]
    for streak in (1, 2, 3, 4, 0, 3):
        units = UnitClips(norms=one, thresholds=one * math.inf, scales=one / 2, streaks=torch.tensor([0.0, streak]))
        norms = GradientNorms(one.sum(), one, one, one, one, units)
        update = UpdateResult(norms, torch.zeros(()), torch.zeros((), dtype=torch.int64), torch.ones(()))
        metrics.add(update)
        told.append(metrics.warnings())
        record = metrics.record(update)
    assert [len(lines) for lines in told] == [0, 0, 1, 0, 0, 1]
    assert "the gradient of decay.norm_of_all was cut below one half in 3 steps in a row" in told[2][0]
    assert record == {f"{key}/{name}": v for key, v in VALUES.items() for name in names}  # no infinite threshold


VALUES = {"unit_norm": 1.0, "unit_scale": 0.5, "unit_clip_share": 1.0}


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        (
            {"units": [{"name": "a", "match": ["wq"]}, {"name": "b", "match": ["attention"]}]},
            ["clip.units a and b both match blocks.0.attention.wq.bias", "narrow one of the rules"],
        ),
        ({"units": [{"name": "a", "match": ["router"]}]}, ["clip.units a matches none of the parameters"]),
        (
            {"units": [{"name": "a", "match": ["role:router"]}]},
            ["group no_decay: clip.units a: there is no role:router; the model has role:"],
        ),
        ({"tighten_from": 50}, ["tighten_from = 50 is not before the end of the schedule, step 50 (half of the run)"]),
    ],
)
def test_units_that_do_not_fit_are_refused(clip: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        clipper({"clip": {"kind": "adaptive", **clip}})
    assert all(word in str(caught.value) for word in words), caught.value


def test_qk_clip_needs_attention_that_it_can_scale() -> None:
    with pytest.raises(UserError, match="no attention layer"):
        QKClip(torch.nn.Linear(2, 2), QKClipConfig(mode="clip"), CPU, {})
    with pytest.raises(UserError, match="normalises queries and keys"):
        QKClip(build_gpt(MODELS["modern"], 8, CPU), QKClipConfig(mode="clip"), CPU, {})
    with pytest.raises(UserError, match="frozen weights"):
        QKClip(build_gpt(MODELS["gpt2"], 8, CPU), QKClipConfig(mode="clip"), CPU, {})
    with pytest.raises(UserError, match="works on cuda, and the run is on cpu"):
        QKClip(build_gpt(MODELS["gpt2"], 8, CPU), QKClipConfig(mode="log", logits="flex"), CPU, {})
    with pytest.raises(UserError, match="heads of 16 numbers, not 2"):
        QKClip(build_gpt(MODELS["gpt2"], 8, CPU), QKClipConfig(mode="log", logits="flex"), torch.device("cuda"), {})


@pytest.mark.parametrize("largest", [math.inf, math.nan, -math.inf, 50.0])
def test_logits_that_are_no_numbers_or_small_change_nothing(largest: float) -> None:
    seen = torch.tensor([largest, 200.0], dtype=torch.float64)
    gamma, query, key = qk_clip_scales(seen, 1, QKClipConfig(threshold=100.0))
    assert gamma.tolist() == query.tolist() == [1.0, 0.5]
    assert key.tolist() == [1.0]


def test_an_infinite_step_is_not_taken(pool: RankPool) -> None:
    assert pool.run(JOBS + "limited_infinity", 2) == [[1.0, 2.0]] * 2


def test_a_loop_of_ones_own_is_told_to_keep_the_history() -> None:
    groups = clipper({"clip": {"kind": "zclip"}}).groups
    with pytest.raises(UserError, match="make a GradientClipper once"):
        dist_clip_gradients(groups, torch.ones(()))
