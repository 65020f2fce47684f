"""A run in two parts is the run in one part: on the same ranks bit by bit, on others up to rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.helpers import checkpoints, damage, disttrain, losses, refused, rows, status


@pytest.fixture(scope="module")
def half(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20 of the 40 steps of the finished run."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    ended = disttrain("train", config, "--nproc", 2, f"run.dir={folder}", "train.steps=20")
    assert ended.code == 0, ended
    return folder


def test_same_layout(half: Path, config: Path, finished_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    with (folder / "metrics.jsonl").open("a") as file:  # as a run that died after its last checkpoint leaves it
        file.writelines(json.dumps({"step": step, "tokens": 256 * step, "loss": 9.0}) + "\n" for step in (21, 22))
        file.write('{"step": 23, "los')
    ended = disttrain("train", config, "--nproc", 2, f"run.dir={folder}")
    assert ended.code == 0, ended
    assert f"resumed from {folder / 'checkpoints/step-00000020'} (step 20)" in ended.out
    assert "note: changed since step 20: train.steps was 20, is 40" in ended.out
    assert [row["step"] for row in rows(folder) if "loss" in row] == list(range(1, 41))
    assert losses(folder) == losses(finished_folder)
    exact = ("loss", "lr", "grad_norm", "validation_loss", "tokens")
    told = {"loss", "validation_loss"}
    parts = [[row for row in rows(run) if told & row.keys()] for run in (folder, finished_folder)]
    for mine, whole in zip(*parts, strict=True):
        assert {key: mine.get(key) for key in exact} == {key: whole.get(key) for key in exact}
    assert status(folder) == {"state": "completed", "step": 40}


@pytest.mark.parametrize(("nproc", "strategy"), [(1, "fsdp"), (4, "ddp")])
def test_other_layouts(
    nproc: int, strategy: str, half: Path, config: Path, finished_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    overrides = [f"run.dir={folder}", f"parallel.strategy={strategy}"]
    ended = disttrain("train", config, "--nproc", nproc, *overrides)
    assert ended.code == 0, ended
    assert losses(folder) == pytest.approx(losses(finished_folder), rel=1e-6)


def test_damaged_checkpoints(config: Path, finished_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_folder, folder)
    start = ["train", config, "--nproc", 2, f"run.dir={folder}", "train.steps=42"]
    damage(folder / "checkpoints/step-00000040")
    ended = disttrain(*start)
    assert ended.code == 0, ended
    assert "step-00000040" in next(line for line in ended.out.splitlines() if "crc32" in line)
    assert "(step 20)" in ended.out
    assert losses(folder).keys() == set(range(1, 43))
    assert {step: loss for step, loss in losses(folder).items() if step <= 40} == losses(finished_folder)

    for name in checkpoints(folder):
        damage(folder / "checkpoints" / name)
    lines = refused(disttrain(*start[:-1], "train.steps=44"))
    assert len([line for line in lines if "crc32" in line]) == len(checkpoints(folder)), lines
    assert "no checkpoint here can be loaded" in lines[-1]
    assert status(folder)["state"] == "failed"
