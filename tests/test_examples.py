"""The plain loop does what the command does; the loops around other models do the same alone and under torchrun."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.helpers import ROOT, TORCHRUN, Ended, disttrain, losses, rows, run

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("processes", [1, 2])
def test_the_plain_loop_is_the_command(processes: int, config: Path, tmp_path: Path) -> None:
    trained, plain = tmp_path / "command", tmp_path / "plain"
    ended = disttrain("train", config, "--nproc", processes, f"run.dir={trained}", "train.steps=8")
    assert ended.code == 0, ended

    launcher = TORCHRUN if processes == 2 else (TORCHRUN[0],)
    ended = run(*launcher, EXAMPLES / "plain_loop.py", config, f"run.dir={plain}", "train.steps=8")
    assert (ended.code, ended.err) == (0, "")
    assert printed_losses(ended) == losses(trained)
    [validation] = re.findall(r"^validation loss (\S+)$", ended.out, re.MULTILINE)
    assert float(validation) == [row for row in rows(trained) if "validation_loss" in row][-1]["validation_loss"]

    # The command takes up what the loop left.
    if processes == 1:
        ended = disttrain("train", config, f"run.dir={plain}", "train.steps=10")
        assert ended.code == 0, ended
        assert "(step 8)" in ended.out
        assert list(losses(plain)) == [9, 10]


@pytest.mark.parametrize(
    ("example", "layouts", "learned"),
    [
        # Below ln 4 = 1.39, a guess among the four strides.
        pytest.param("muon_plain.py", ["fsdp", "ddp"], 1.0, id="plain"),
        # From ln 256 = 5.5, a guess among all bytes.
        pytest.param("muon_transformers.py", [None], 3.0, id="transformers"),
    ],
)
def test_a_loop_of_ones_own_does_not_depend_on_the_layout(
    example: str, layouts: list[str | None], learned: float
) -> None:
    alone = run(TORCHRUN[0], EXAMPLES / example)
    assert alone.code == 0, alone
    expected = printed_losses(alone)
    assert list(expected) == list(range(1, 31))
    assert expected[30] < learned
    for layout in layouts:
        ended = run(*TORCHRUN, EXAMPLES / example, *([layout] if layout else []))
        assert ended.code == 0, ended
        assert printed_losses(ended) == pytest.approx(expected, rel=1e-5)


def printed_losses(ended: Ended) -> dict[int, float]:
    found = re.findall(r"^step (\d+) loss (\S+)$", ended.out, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}
