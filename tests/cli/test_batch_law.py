"""Batch ramps, the rules that follow the batch, and other numbers of processes, through the public command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.helpers import TRAIN, checkpoints, disttrain, losses, refused, rows, started, wait_for

RAMP = ["train.global_batch_tokens=512", "train.batch_ramp.start_tokens=128", "train.batch_ramp.over_tokens=6000"]


def manifest(folder: Path, step: int) -> dict[str, int]:
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())


def in_tokens(config: Path, folder: Path) -> Path:
    """The same with a length in tokens."""
    file = folder / "tokens.toml"
    file.write_text(config.read_text().replace("steps = 40\n", "tokens = 30720\n", 1))
    return file


def test_a_ramp_goes_on_after_a_kill_and_on_any_number_of_processes(config: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["train", config, *RAMP, "schedule.base_batch_tokens=512", "checkpoint.every=5"]
    ended = disttrain(*command, "--nproc", 2, f"run.dir={whole}", "train.steps=60")
    assert ended.code == 0, ended
    assert "batch of 128 tokens, 0.25 times the base of 512:" in ended.out
    assert "group decay: lr 0.0003 -> 0.00015 (sqrt)" in ended.out
    with started(*TRAIN, *command[1:], "--nproc", 2, f"run.dir={parts}", "train.steps=60") as process:
        wait_for(lambda: bool(checkpoints(parts)), process)  # leaving the block kills all of it
    for nproc, steps in ((1, 50), (4, 60)):
        ended = disttrain(*command, "--nproc", nproc, f"run.dir={parts}", f"train.steps={steps}")
        assert ended.code == 0, ended
    assert "1 processes before, 4 now: the global batch stays at 512 tokens" in ended.out
    by_step = [{row["step"]: row for row in rows(folder) if "loss" in row} for folder in (whole, parts)]
    for key in ("tokens", "global_batch_tokens", "lr", "valid_tokens"):
        expected, seen = ({step: row[key] for step, row in run.items()} for run in by_step)
        assert seen == expected
    sizes = [row["global_batch_tokens"] for row in by_step[0].values()]
    assert sorted(set(sizes)) == [128, 256, 384, 512]
    assert sizes == sorted(sizes)
    # The same loss at every step is the same samples at every step: none left out, none twice.
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert [manifest(folder, 60)["samples"] for folder in (whole, parts)] == [sum(sizes) // 32] * 2


def test_another_number_of_processes_or_a_hand_may_change_the_batch(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["train", in_tokens(config, tmp_path), "schedule.base_batch_tokens=256", f"run.dir={folder}"]
    command.append("optim.lr=1e-3")
    assert disttrain(*command, "--nproc", 1, "train.tokens=2560").code == 0
    lines = refused(disttrain(*command, "--nproc", 2, "train.on_world_change=refuse"))
    assert any("the checkpoint is of 1 processes, and there are 2; start 1, or" in line for line in lines), lines
    for nproc, tokens in ((2, 7680), (1, 10_240)):
        scaled = [*command, "train.on_world_change=scale_lr", "--nproc", nproc, f"train.tokens={tokens}"]
        ended = disttrain(*scaled)
        assert ended.code == 0, ended
        if nproc == 2:
            assert "1 processes before, 2 now: the global batch goes from 256 to 512 tokens, 2 times that" in ended.out
            assert "group decay: lr 0.001 -> 0.001414 (sqrt)" in ended.out
    ended = disttrain(*command, "--nproc", 1, "train.tokens=12800", "train.global_batch_tokens=512")
    assert ended.code == 0, ended
    assert "changed since step 30: train.global_batch_tokens was 256, is 512" in ended.out
    assert "the global batch goes from 256 to 512 tokens" in ended.out
    logged = {row["step"]: row for row in rows(folder) if "loss" in row}
    sizes = {10: 256, 11: 512, 20: 512, 21: 256, 30: 256, 31: 512, 35: 512}
    assert {step: logged[step]["global_batch_tokens"] for step in sizes} == sizes
    assert logged[35]["tokens"] == 20 * 256 + 15 * 512
    extra = json.dumps(manifest(folder, 35)["extra"])  # type: ignore[index]
    assert '"stages": [[0, 8], [2560, 16], [7680, 8], [10240, 16]]' in extra


def test_a_run_may_find_its_batch(config: Path, tmp_path: Path) -> None:
    """The noise scale of a model that has learnt nothing yet is far above these batches."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    file = in_tokens(config, tmp_path)
    command = ["train", file, "train.global_batch_tokens=1024", "train.batch_auto.start_tokens=256"]
    command += ["train.batch_auto.every_steps=12", "train.batch_auto.ratio=0.001", "monitor.noise_scale_every=1"]
    ended = disttrain(*command, "--nproc", 2, f"run.dir={whole}")
    assert ended.code == 0, ended
    assert "the batch goes from 256 to 512 tokens" in ended.out
    assert "the batch goes from 512 to 1,024 tokens" in ended.out
    logged = {row["step"]: row for row in rows(whole) if "loss" in row}
    last = max(logged)
    assert [logged[step]["global_batch_tokens"] for step in (1, last)] == [256, 1024]
    assert logged[last]["tokens"] >= 30_720 > logged[last - 1]["tokens"]
    assert logged[last]["noise_scale_tokens"] > 0
    assert logged[last]["suggested_batch_tokens"] % 64 == 0
    assert disttrain(*command, "--nproc", 2, f"run.dir={parts}", "train.tokens=7000").code == 0
    ended = disttrain(*command, "--nproc", 2, f"run.dir={parts}")
    assert ended.code == 0, ended
    assert losses(parts).keys() == losses(whole).keys()
    assert "complete at step" in disttrain(*command, "--nproc", 2, f"run.dir={parts}").out


def test_groups_have_schedules_of_their_own(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "groups.toml"
    file.write_text(f"""
extends = "{config}"
[schedule]
shape = "constant"
[[optim.groups]]
name = "matrices"
match = ["role:matrices"]
algorithm = "muon"
lr = 1e-3
schedule = {{ shape = "wsd", warmup_steps = 0, cooldown_steps = 10, cooldown = "sqrt", final_ratio = 0.0 }}
[[optim.groups]]
name = "rest"
match = [".*"]
lr = 1e-3
""")
    ended = disttrain("train", file, "--nproc", 1, f"run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended
    logged = {row["step"]: row for row in rows(tmp_path / "run") if "loss" in row}
    assert [logged[step]["lr/rest"] for step in (1, 4, 40)] == pytest.approx([2.5e-4, 1e-3, 1e-3])
    assert [logged[step]["lr/matrices"] for step in (1, 30, 35, 40)] == pytest.approx(
        [1e-3, 1e-3, 1e-3 * (1 - 0.5**0.5), 0.0]
    )
