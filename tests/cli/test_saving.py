"""Checkpoints through the public command: what they cost, disks that refuse, and runs that begin with weights."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import TIMEOUT_SECONDS, checkpoints, damage, disttrain, environment, refused, rows, status


def train_with_small_files(limit_bytes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`disttrain train` where the system lets no file grow beyond `limit_bytes`, as a full disk would not."""
    return subprocess.run(
        [sys.executable, "-m", "disttrain", "train", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )


def test_what_a_checkpoint_cost_is_told(finished_folder: Path) -> None:
    costs = [row for row in rows(finished_folder) if "checkpoint_bytes" in row]
    assert [row["checkpoint_step"] for row in costs] == [20, 40]
    assert all(row["step"] >= row["checkpoint_step"] for row in costs)
    for row in costs:
        files = (finished_folder / f"checkpoints/step-{row['checkpoint_step']:08d}").glob("*.safetensors")
        assert row["checkpoint_bytes"] == sum(file.stat().st_size for file in files)
        assert row["checkpoint_stall_seconds"] >= 0
        assert row["checkpoint_write_seconds"] >= 0


def test_keep_every(config: Path, tmp_path: Path) -> None:
    settings = ["checkpoint.every=4", "checkpoint.keep_last=1", "checkpoint.keep_every=8", "train.steps=20"]
    ended = disttrain("train", config, "--nproc", 2, f"run.dir={tmp_path}", *settings)
    assert ended.code == 0, ended
    assert checkpoints(tmp_path) == ["step-00000008", "step-00000016", "step-00000020"]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_disk_that_takes_no_checkpoint(asynchronous: str, config: Path, tmp_path: Path) -> None:
    small = ["train.steps=10", "checkpoint.every=5", f"checkpoint.asynchronous={asynchronous}"]
    first = disttrain("train", config, "--nproc", 2, f"run.dir={tmp_path}", *small)
    assert first.code == 0, first
    longer = [config, "--nproc", 2, f"run.dir={tmp_path}", *small, "train.steps=30"]
    for file in (tmp_path / "checkpoints/step-00000010").glob("*.safetensors"):
        assert file.stat().st_size > 30_000
    ended = train_with_small_files(30_000, *longer)
    assert ended.returncode == 1, ended
    assert "Traceback" not in ended.stdout + ended.stderr
    warnings = [line for line in ended.stdout.splitlines() if line.startswith("warning: checkpoint of step")]
    assert len(warnings) >= 2
    for words in ("step 15 not saved", "File too large", "bytes written", "bytes free", "(step-00000010 stays the"):
        assert words in warnings[0]
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: checkpoint of step 30 not saved")
    assert status(tmp_path) == {"state": "failed", "step": 10}
    assert checkpoints(tmp_path) == ["step-00000005", "step-00000010"]

    stopped = train_with_small_files(30_000, *longer, "checkpoint.on_error=stop")
    assert stopped.returncode == 1, stopped
    assert "error: checkpoint of step 15 not saved" in stopped.stderr
    assert disttrain("train", *longer).code == 0


def test_a_warning_where_two_checkpoints_do_not_fit(config: Path, tmp_path: Path) -> None:
    code = (
        "import shutil, sys; from collections import namedtuple;"
        "usage = namedtuple('usage', 'total used free');"
        "shutil.disk_usage = lambda path: usage(10**6, 10**6 - 1000, 1000);"
        "from disttrain.cli.app import main; main()"
    )
    arguments = ["train", config, "--nproc", 1, f"run.dir={tmp_path}", "train.steps=2"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended
    (line,) = [line for line in ended.stdout.splitlines() if "two checkpoints need" in line]
    assert "1,000 bytes free" in line
    assert "short" in line


def test_begin_with_the_weights_of_another_run(config: Path, finished_folder: Path, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(finished_folder, origin)
    folder = tmp_path / "run"
    start = ["train", config, "--nproc", 2, f"train.init_from={origin}", "train.steps=4"]
    ended = disttrain(*start, f"run.dir={folder}", "parallel.strategy=ddp", "train.seed=5")
    assert ended.code == 0, ended
    assert f"weights from {origin}/checkpoints/step-00000040 (step 40); everything else is new" in ended.out
    mine, theirs = rows(folder), rows(origin)
    assert mine[0]["step"] == 1
    assert mine[0]["lr"] == theirs[0]["lr"]
    assert mine[0]["loss"] < theirs[0]["loss"] - 0.1

    damage(origin / "checkpoints/step-00000040")
    ended = disttrain(*start, f"run.dir={tmp_path / 'older'}")
    assert "step-00000020 (step 20); everything else" in ended.out
    assert "crc32" in ended.out
    one = disttrain(*start[:-2], f"train.init_from={origin}/checkpoints/step-00000040", f"run.dir={tmp_path / 'one'}")
    assert "crc32" in refused(one)[0]


def test_weights_that_do_not_fit_are_refused_before_anything_starts(
    config: Path, finished_folder: Path, no_torch: dict[str, str], tmp_path: Path
) -> None:
    start = ["train", config, f"run.dir={tmp_path / 'run'}"]
    lines = refused(disttrain(*start, f"train.init_from={finished_folder}", "model.d_model=32", env=no_torch))
    assert "model.d_model is 16 there, 32 here" in lines[0]
    assert "weights of another model" in lines[1]
    (line,) = refused(disttrain(*start, f"train.init_from={tmp_path / 'absent'}", env=no_torch))
    assert "no checkpoint there" in line
