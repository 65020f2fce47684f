"""Groups, optimizers and clipping through the public command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.helpers import disttrain, losses, refused, rows, status

GROUPS = """
extends = "{base}"

[optim]
lr = 1e-3

[[optim.groups]]
name = "matrices"
match = ["{rule}"]
algorithm = "lion"
lr = 3e-4
clip = {{ kind = "norm", limit = 0.1, p = "inf" }}

[[optim.groups]]
name = "rest"
match = ["{rest}"]
algorithm = "{algorithm}"
clip = {{ kind = "value", limit = 0.001 }}
"""


def grouped(
    folder: Path, base: Path, rule: str = "role:matrices", rest: str = ".*", algorithm: str = "adafactor"
) -> Path:
    file = folder / "groups.toml"
    file.write_text(GROUPS.format(base=base, rule=rule, rest=rest, algorithm=algorithm))
    return file


def test_groups_are_announced_stored_and_measured(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    file = grouped(tmp_path, config)
    ended = disttrain("train", file, "--nproc", 2, f"run.dir={folder}", "train.steps=6")
    assert ended.code == 0, ended
    assert "group matrices: lion (disttrain.optim.elementwise.Lion), lr 0.0003" in ended.out
    assert "clip: inf-norm of group to 0.1" in ended.out
    owned = json.loads((folder / "ownership.json").read_text())["parameters"]
    assert {row["group"] for row in owned} == {"matrices", "rest"}
    assert {row["algorithm"] for row in owned if "mlp" in row["parameter"]} <= {"lion", "adafactor"}
    logged = [row for row in rows(folder) if "loss" in row]
    for row in logged:
        assert row["lr/matrices"] / row["lr/rest"] == pytest.approx(0.3)
        assert 0 < row["clip_scale/matrices"] <= 1
        assert row["clip_scale/rest"] == 1
        assert 0 < row["clip_share/rest"] < 1
        both = row["grad_norm/matrices"] ** 2 + row["grad_norm/rest"] ** 2
        assert both == pytest.approx(row["grad_norm"] ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("rule", "rest", "algorithm", "said"),
    [
        ("mlq", ".*", "adamw", "optim.groups: group matrices: 'mlq' matches none of the parameters: wte.weight"),
        ("mlp", ".*", "adamm", "groups.toml:14: optim.groups.1: algorithm 'adamm' is not known; did you mean adam?"),
    ],
)
def test_bad_groups(config: Path, tmp_path: Path, rule: str, rest: str, algorithm: str, said: str) -> None:
    file = grouped(tmp_path, config, rule, rest, algorithm)
    lines = refused(disttrain("train", file, "--nproc", 2, f"run.dir={tmp_path / 'run'}"))
    assert any(said in line for line in lines), lines


def test_numbers_that_are_none_end_the_run_with_names(config: Path, tmp_path: Path) -> None:
    overrides = ["optim.preset=sgd", "optim.lr=1e30", "optim.clip_norm=0", f"run.dir={tmp_path / 'run'}"]
    ended = disttrain("train", config, "--nproc", 2, *overrides)
    assert ended.code == 1, ended
    assert "Traceback" not in ended.err
    (line,) = [line for line in ended.err.splitlines() if "not finite" in line]
    assert "the gradient of wte.weight, " in line
    assert status(tmp_path / "run")["state"] == "failed"


def test_what_does_not_move_is_warned_of(config: Path, tmp_path: Path) -> None:
    overrides = ["optim.lr=1e-30", "optim.weight_decay=0.0", "train.steps=2", f"run.dir={tmp_path / 'run'}"]
    ended = disttrain("train", config, "--nproc", 2, *overrides)
    assert ended.code == 0, ended
    (line,) = [line for line in ended.out.splitlines() if "did not move" in line]
    assert "wte.weight" in line


def test_schedule_free_is_used_at_its_average_and_resumed_to_the_bit(config: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    free = ["train", config, "--nproc", 2, "optim.preset=schedule_free_adamw", "monitor.log_every=1"]
    assert disttrain(*free, f"run.dir={whole}").code == 0
    assert disttrain(*free, f"run.dir={halves}", "train.steps=20").code == 0
    assert disttrain(*free, f"run.dir={halves}").code == 0
    assert losses(halves) == losses(whole)
    assert [row["lr"] for row in rows(whole) if "lr" in row][4:] == [2.5e-3] * 36  # no decay after the warm-up
    validation = [row for row in rows(whole) if "validation_loss" in row][-1]
    evaluated = disttrain("evaluate", whole, "--json")
    assert evaluated.code == 0, evaluated
    assert json.loads(evaluated.out)["validation_loss"] == pytest.approx(validation["validation_loss"], rel=1e-6)


def test_another_algorithm_does_not_fit_the_checkpoint(finished_folder: Path, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_folder, folder)
    ended = disttrain("train", config, "--nproc", 2, f"run.dir={folder}", "train.steps=42", "optim.preset=lion")
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    assert ".exp_avg_sq: in the checkpoint, but not asked for" in ended.err
    assert f"with train.init_from={folder / 'checkpoints/step-00000040'}" in ended.err.splitlines()[-1]
