"""The script that starts torchrun on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import ROOT, environment, losses, run, status

SCRIPT = ROOT / "launch/local.sh"


@pytest.mark.parametrize("arguments", [[], ["fsdp"]])
def test_usage(arguments: list[str]) -> None:
    ended = run(SCRIPT, *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert "usage: launch/local.sh STRATEGY NPROC [key.path=value ...]" in ended.err


def test_two_processes(config: Path, finished_folder: Path, tmp_path: Path) -> None:
    env = environment(CONFIG=str(config), RANK="7", MASTER_ADDR="203.0.113.1")
    ended = run("env", "-C", tmp_path, SCRIPT, "ddp", 2, "train.steps=3", env=env)
    assert (ended.code, ended.err) == (0, "")
    folder = tmp_path / "runs/tiny-ddp"
    assert status(folder) == {"state": "completed", "step": 3}
    expected = {step: loss for step, loss in losses(finished_folder).items() if step <= 3}
    assert losses(folder) == pytest.approx(expected, rel=1e-6)
