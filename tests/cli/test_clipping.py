"""Clipping, limited updates and QK-Clip through the public command."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.checkpoint.manifest import read_manifest
from tests.cli.helpers import disttrain, losses, refused, rows

UNITS = """
extends = "{base}"

[optim.clip]
kind = "adaptive"

[[optim.clip.units]]
name = "attention"
match = ["attention"]

[[optim.clip.units]]
name = "{name}"
match = ["{rule}"]
importance = {importance}
"""


def test_muonclip_resumes_to_the_bit_and_on_another_layout(config: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["train", config, "optim.preset=muonclip", "optim.lr=3e-3", "optim.clip.kind=adaptive"]
    command += ["optim.clip.warmup_steps=5", "optim.qk_clip.logits=exact", "optim.qk_clip.threshold=0.02"]
    command += ["optim.clip.early=1.0", "optim.clip.late=0.5", "schedule.horizon_steps=40"]
    command += ["optim.clip.tighten_until=20"]
    sharded = ["--nproc", 2, "parallel.strategy=fsdp"]
    ended = disttrain(*command, *sharded, f"run.dir={whole}")
    assert ended.code == 0, ended
    assert "clip: adaptive, 1 to 0.5 deviations, norm of all to 1" in ended.out
    assert disttrain(*command, *sharded, f"run.dir={parts}", "train.steps=15").code == 0
    assert disttrain(*command, *sharded, f"run.dir={parts}", "train.steps=30").code == 0
    assert disttrain(*command, "--nproc", 1, f"run.dir={parts}").code == 0
    expected, seen = losses(whole), losses(parts)
    assert {step: loss for step, loss in seen.items() if step <= 30} == {
        step: loss for step, loss in expected.items() if step <= 30
    }
    assert seen == {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()}

    last = [row for row in rows(whole) if "loss" in row][-1]
    for unit in ("matrices.attention_qk.0", "matrices.attention_vo.0", "matrices.mlp.0", "no_decay.embeddings"):
        assert last[f"unit_norm/{unit}"] > 0
        assert last[f"unit_threshold/{unit}"] > 0
        assert 0 < last[f"unit_scale/{unit}"] <= 1
    logged = [row for row in rows(whole) if "loss" in row]
    assert any(value for row in logged for key, value in row.items() if key.startswith("unit_clip_share/"))
    assert any(row["qk_clip_heads"] for row in logged)
    assert last["max_attention_logit"] == last["max_attention_logit/0"]
    [*_, newest] = sorted((whole / "checkpoints").iterdir())
    held = {name for name in read_manifest(newest).tensors if name.startswith("service.clip.")}
    assert {"service.clip.matrices.attention_qk.0", "service.clip.no_decay.embeddings"} <= held


def test_log_only_measures_and_changes_nothing(config: Path, tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    command = ["train", config, "--nproc", 1, "train.steps=10", "monitor.log_every=1", "optim.clip.kind=agc"]
    assert disttrain(*command, f"run.dir={plain}").code == 0
    log = [
        "optim.qk_clip.mode=log",
        "optim.qk_clip.threshold=1e-9",
        "optim.max_update_ratio=100.0",
        "model.qk_norm=false",
    ]
    assert disttrain(*command, *log, f"run.dir={watched}").code == 0
    assert losses(watched) == losses(plain)
    last = [row for row in rows(watched) if "loss" in row][-1]
    assert last["max_attention_logit"] > 0
    assert (last["qk_clip_heads"], last["qk_clip_scale"]) == (0, 1)
    assert 0 < last["update_ratio/decay"] < 100
    assert last["update_limit_share/decay"] == 0


CASES = {
    "importance below one": ({"importance": "0.5"}, ["units.1.importance", "greater than or equal to 1", "0.5"]),
    "rules that overlap": ({"rule": "wq"}, ["clip.units attention and second both match", "attention.wq", "narrow"]),
    "a rule without a match": ({"rule": "router"}, ["clip.units second matches none of the parameters"]),
    "a reserved name": ({"name": "rest"}, ["units: 'rest' is the name of what no rule matches"]),
    "a name twice": ({"name": "attention"}, ["units: the name attention is given twice"]),
}


@pytest.mark.parametrize(("fields", "words"), CASES.values(), ids=CASES)
def test_bad_units_are_refused(config: Path, tmp_path: Path, fields: dict[str, str], words: list[str]) -> None:
    file = tmp_path / "units.toml"
    file.write_text(UNITS.format(base=config, **{"name": "second", "rule": "mlp", "importance": "1.5", **fields}))
    lines = refused(disttrain("train", file, "--nproc", 1, f"run.dir={tmp_path / 'run'}"))
    assert all(word in "\n".join(lines) for word in words), lines


ADAPTIVE = "optim.clip.kind=adaptive"
OVERRIDES = {
    "a schedule that ends before it begins": (
        [ADAPTIVE, "optim.clip.tighten_from=9", "optim.clip.tighten_until=9"],
        ["tighten_until = 9 is not after tighten_from = 9", "end before it begins"],
    ),
    "a schedule that begins after half of the run": (
        [ADAPTIVE, "optim.clip.tighten_from=25"],
        ["tighten_from = 25 is not before the end of the schedule, step 20 (half of the run)"],
    ),
    "strict before loose": ([ADAPTIVE, "optim.clip.late=5.0"], ["late = 5.0 is above early = 4.0"]),
    "no such kind": (
        ["optim.clip.kind=adaptiv"],
        ["optim.clip", "kind 'adaptiv' is not known", "did you mean adaptive?"],
    ),
    "qk-norm": (
        ["optim.preset=muonclip", "model.qk_norm=true"],
        ["optim.qk_clip", "model.qk_norm = true", "undoes", "optim.qk_clip.mode = 'log'"],
    ),
    "a threshold below the bound of any head": (
        ["optim.qk_clip.mode=clip", "optim.qk_clip.threshold=3.0"],
        ["optim.qk_clip.threshold = 3.0", "log(train.sequence_length) = 3.47", "optim.qk_clip.logits = 'exact'"],
    ),
    "another device's kernel": (
        ["optim.qk_clip.mode=log", "optim.qk_clip.logits=flex"],
        ["optim.qk_clip.logits = 'flex' works on cuda, and the run is on cpu"],
    ),
    "averaged points": (
        ["optim.preset=schedule_free_adamw", "optim.max_update_ratio=0.1"],
        ["max_update_ratio", "schedule_free_adamw"],
    ),
}


@pytest.mark.parametrize(("overrides", "words"), OVERRIDES.values(), ids=OVERRIDES)
def test_bad_settings_are_refused(config: Path, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    lines = refused(disttrain("train", config, "--nproc", 1, f"run.dir={tmp_path / 'run'}", *overrides))
    assert all(word in "\n".join(lines) for word in words), lines
