"""Two ranks on this machine under the launchers of accelerate and deepspeed, where these are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import disttrain, environment, run, status

pytestmark = pytest.mark.timeout(180)


def test_accelerate(config: Path, tmp_path: Path) -> None:
    """Its launcher asks for no GPU; only its config must not say that there is none."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate comes with the extra [accelerate]")
    written = tmp_path / "accelerate.yaml"
    options = ("--target", "accelerate", "--nproc", 2, "--output", written)
    assert disttrain("launch", config, 'device="auto"', *options).code == 0
    command = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", written, "-m", "disttrain", "train")
    ended = run(*command, config, f"run.dir={tmp_path / 'run'}", "train.steps=3")
    assert ended.code == 0, ended
    assert status(tmp_path / "run") == {"state": "completed", "step": 3}
    assert "rows over 2" in ended.out


def test_deepspeed(config: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None or shutil.which("deepspeed") is None:
        pytest.skip("deepspeed comes with the extra [deepspeed]")
    script = tmp_path / "deepspeed.sh"
    assert disttrain("launch", config, "--target", "deepspeed", "--nproc", 2, "--output", script).code == 0
    # The launcher looks for its own interpreter on PATH, and counts GPUs unless it is told of CPUs.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(RUN_DIR=str(tmp_path / "run"), DS_ACCELERATOR="cpu", PATH=path)
    ended = run("bash", script, "train.steps=3", env=env)
    assert ended.code == 0, ended
    assert status(tmp_path / "run") == {"state": "completed", "step": 3}
    assert "rows over 2" in ended.out
