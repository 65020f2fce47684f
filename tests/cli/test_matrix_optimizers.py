"""Optimizers of whole matrices through the public command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.helpers import disttrain, losses, refused, rows

GROUPS = """
extends = "{base}"

[[optim.groups]]
name = "matrices"
match = ["{rule}"]
algorithm = "{algorithm}"
lr = 1e-3
{more}

[[optim.groups]]
name = "rest"
match = [".*"]
algorithm = "adamw"
"""
FUNCTIONS = "tests.optim.matrix_functions:"


def grouped(folder: Path, base: Path, algorithm: str, rule: str = "role:matrices", more: str = "") -> Path:
    file = folder / "groups.toml"
    file.write_text(GROUPS.format(base=base, rule=rule, algorithm=algorithm, more=more))
    return file


@pytest.mark.parametrize(("preset", "strategy"), [("muon", "fsdp"), ("soap", "ddp")])
def test_a_run_tells_who_computes_what_and_resumes_to_the_bit(
    config: Path, tmp_path: Path, preset: str, strategy: str
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    command = ["train", config, "--nproc", 2, f"optim.preset={preset}", f"parallel.strategy={strategy}"]
    command += ["optim.lr=3e-3", "optim.weight_decay=0"]
    ended = disttrain(*command, f"run.dir={whole}")
    assert ended.code == 0, ended
    how = "1 bucket, " if strategy == "fsdp" else "2 copies of 1 shard, each matrix computed once: "
    [line] = [line for line in ended.out.splitlines() if "dearest owner" in line]
    assert line.startswith("6 matrices (")
    assert how in line
    assert f"group matrices: {preset} (disttrain.optim.matrix_optimizer.MatrixOptimizer), lr 0.003" in ended.out
    # SOAP's first step only looks: its second is the first update.
    assert "did not move" not in ended.out
    owned = json.loads((whole / "ownership.json").read_text())
    assert {row["parameter"] for row in owned["parameters"] if row["algorithm"] == preset} == {
        f"blocks.0.{part}.weight"
        for part in ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "mlp.up", "mlp.down")
    }
    [table] = owned["matrix_exchanges"]
    assert table[0] == line
    assert sum("blocks.0.mlp.up.weight 64x16" in row for row in table) == 1

    assert disttrain(*command, f"run.dir={halves}", "train.steps=20").code == 0
    assert disttrain(*command, f"run.dir={halves}").code == 0
    assert losses(halves) == losses(whole)
    logged = [row for row in rows(whole) if "loss" in row]
    assert all(row["lr/matrices"] == row["lr/no_decay"] for row in logged)
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.5


def test_a_function_of_the_users_trains_and_is_verified(config: Path, tmp_path: Path) -> None:
    file = grouped(tmp_path, config, FUNCTIONS + "Whitened", more="arguments = { beta = 0.8 }\nmomentum = 0.9")
    ended = disttrain("train", file, "--nproc", 2, f"run.dir={tmp_path / 'run'}", "train.steps=20")
    assert ended.code == 0, ended
    assert f"group matrices: {FUNCTIONS}Whitened (disttrain.optim.matrix_optimizer.MatrixOptimizer)" in ended.out
    verified = disttrain("verify", "--nproc", 2, "--optimizer", FUNCTIONS + "Whitened", "--json")
    assert verified.code == 0, verified
    cells = json.loads(verified.out)["rows"]
    assert {cell["strategy"] for cell in cells} == {
        *("ddp", "ddp replicate", "zero1", "zero2", "fsdp", "hsdp", "hsdp spread")
    }
    assert all(cell["passed"] and FUNCTIONS + "Whitened" in cell["case"] for cell in cells)


@pytest.mark.parametrize(
    ("algorithm", "rule", "more", "said"),
    [
        ("muon", "^blocks", "", "group matrices: muon takes matrices only, not blocks.0.attention_norm.weight (16), "),
        ("muon", "wte", "", "muon is for matrices that multiply every token, and wte.weight is a table"),
        (
            "muon",
            "role:matrices",
            'coefficients = "kellr5"',
            "optim.groups.0.coefficients: must be one of polar_express5, keller5, you5, deepseekv4, or a list of ",
        ),
        (
            "muon",
            "mlp.up.weight",
            'split = [{ match = "up", sizes = [60, 3] }]',
            "60 + 3 = 63, and blocks.0.mlp.up.weight",
        ),
        (FUNCTIONS + "transposed", "role:matrices", "", "its update returned (3, 7) for a matrix of shape (7, 3)"),
    ],
)
def test_bad_input(config: Path, tmp_path: Path, algorithm: str, rule: str, more: str, said: str) -> None:
    file = grouped(tmp_path, config, algorithm, rule, more)
    lines = refused(disttrain("train", file, "--nproc", 2, f"run.dir={tmp_path / 'run'}"))
    assert any(said in line for line in lines), lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optimizer", "muonn"], "--optimizer muonn: not known; there are sgd, "),
        (["--optimizer", FUNCTIONS + "nothing"], "its update returned NoneType"),
        (["--optimizer", "muon", "--nproc", "1"], "one process has nothing to compare with"),
    ],
)
def test_what_cannot_be_verified(arguments: list[str], said: str) -> None:
    (line,) = refused(disttrain("verify", *arguments))
    assert said in line
