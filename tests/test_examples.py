"""The example does what the command does, alone and under torchrun."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import TINY
from tests.cli.helpers import ROOT, TORCHRUN, disttrain, losses, rows, run

EXAMPLES = ROOT / "examples"
EXAMPLE = EXAMPLES / "plain_loop.py"


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


def printed_losses(*command: object) -> list[float]:
    ended = run(*command)
    assert ended.code == 0, ended
    found = re.findall(r"^step (\d+) loss (\S+)", ended.out, re.MULTILINE)
    assert [int(step) for step, _ in found] == list(range(1, len(found) + 1))
    return [float(loss) for _, loss in found]


@pytest.mark.parametrize(
    ("name", "layouts", "learnt"), [("muon_plain", ("fsdp", "ddp"), 0.25), ("muon_transformers", ("",), 0.6)]
)
def test_muon_in_other_peoples_loops(name: str, layouts: tuple[str, ...], learnt: float) -> None:
    """Every layout prints the losses of one process, and they fall."""
    alone = printed_losses(TORCHRUN[0], EXAMPLES / f"{name}.py")
    assert alone[-1] < learnt * alone[0]
    for layout in layouts:
        assert printed_losses(*TORCHRUN, EXAMPLES / f"{name}.py", *filter(None, [layout])) == pytest.approx(
            alone, rel=1e-4
        )
