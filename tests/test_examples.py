"""The example does what the command does, alone and under torchrun."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import TINY
from tests.cli.helpers import ROOT, TORCHRUN, disttrain, losses, rows, run

EXAMPLE = ROOT / "examples/plain_loop.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    file = folder / "tiny.toml"
    file.write_text(TINY.format(cache=folder / "cache"))
    return file


@pytest.mark.parametrize("processes", [1, 2])
def test_the_plain_loop_is_the_command(processes: int, config: Path, tmp_path: Path) -> None:
    trained, plain = tmp_path / "command", tmp_path / "plain"
    ended = disttrain("train", config, "--nproc", processes, f"run.dir={trained}", "train.steps=8")
    assert ended.code == 0, ended

    launcher = TORCHRUN if processes == 2 else (TORCHRUN[0],)
    ended = run(*launcher, EXAMPLE, config, f"run.dir={plain}", "train.steps=8")
    assert (ended.code, ended.err) == (0, "")
    measured = {
        int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)$", ended.out, re.MULTILINE)
    }
    assert measured == losses(trained)
    [validation] = re.findall(r"^validation loss (\S+)$", ended.out, re.MULTILINE)
    assert float(validation) == [row for row in rows(trained) if "validation_loss" in row][-1]["validation_loss"]

    # The command takes up what the loop left.
    if processes == 1:
        ended = disttrain("train", config, f"run.dir={plain}", "train.steps=10")
        assert ended.code == 0, ended
        assert "(step 8)" in ended.out
        assert list(losses(plain)) == [9, 10]
