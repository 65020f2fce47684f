"""A smoke comparison through the public command: stopped, killed, ended, and asked for again."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cli.helpers import disttrain, environment, events, processes_of, refused, run, started, status, wait_for

OWN = "tests.studies.toys:own_update"
ASKED = ("--optimizers", f"adamw,{OWN}", "--protocol", "smoke", "--tokens", 2560, "--rate-factors", "1,4", "--seeds", 1)


@pytest.fixture(scope="module")
def command(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    text = config.read_text().replace("horizon_steps = 40\n", "")
    file = tmp_path_factory.mktemp("compare") / "toy.toml"
    file.write_text(text)
    return ("compare", file, *ASKED, "train.nproc=1")


def test_stopped_killed_and_the_same_table_twice(command: tuple[object, ...], tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    cells = folder / "cells"
    whole = (*command, "--folder", folder)

    def ended() -> list[str]:
        return sorted(path.parent.name for path in cells.glob("*/status.json") if "completed" in path.read_text())

    with started(sys.executable, "-m", "disttrain", *whole) as process:
        wait_for(lambda: len(ended()) >= 1, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, (out, err)
    assert "8 runs: 6 to search, 2 to compare" in out
    assert "estimated for this processor, from a matrix product" in out
    assert "stopped on request; start again to go on" in out
    done = ended()
    assert len(done) < 8

    with started(sys.executable, "-m", "disttrain", *whole) as process:
        wait_for(lambda: len(ended()) > len(done) + 1, process)
        process.kill()
        process.wait()
        wait_for_none(cells)
    done = ended()
    begun = {name: len(events(cells / name)) for name in done}

    first = disttrain(*whole)
    assert first.code == 0, first
    assert len(ended()) == 8
    assert {name: len(events(cells / name)) for name in done} == begun  # what had ended was not begun again
    result = json.loads((folder / "result.json").read_text())
    assert [row["row"]["label"] for row in result["rows"]] == ["adamw", OWN]
    assert [row["verdict"] for row in result["rows"]] == [None, "no verdict"]
    for row in result["rows"]:
        assert len(row["trials"]) == 3
        assert row["step_ratio"] > 0
    weights = 256 * 16 + 32 * 16 + 12 * 16 * 16  # and vectors, and a step counter for each tensor
    assert 8 * weights < result["rows"][0]["state_bytes"] < 8 * weights * 1.2
    assert "warning: adamw: the best lr 0.0012 is the largest of its grid" in first.out
    files = ("result.json", "table.md", "compare.svg", "compare.html")
    before = [(folder / name).read_text() for name in files]
    second = disttrain(*whole)
    assert second.code == 0, second
    assert [(folder / name).read_text() for name in files] == before
    cell = cells / ended()[0]
    assert status(cell)["state"] == "completed"
    assert "nothing to do" in disttrain("train", cell).out  # an ordinary run folder

    other = refused(disttrain(*command, "model.d_model=32", "--folder", folder))
    assert other[0] == "error: model.d_model was 16, is 32"


def wait_for_none(folder: Path) -> None:
    """Ranks end with the command that was killed."""
    end = time.monotonic() + 30
    while processes_of(folder) and time.monotonic() < end:
        time.sleep(0.05)
    assert processes_of(folder) == []


def test_bad_input_needs_no_torch(command: tuple[object, ...], no_torch: dict[str, str], tmp_path: Path) -> None:
    place = ("--folder", tmp_path / "x")
    lines = refused(disttrain(*command[:2], "--optimizers", "adamw,lyon", "--seeds", 1, *place, env=no_torch))
    assert any("optimizer 'lyon' is not known; did you mean lion?" in line for line in lines)
    assert any("--seeds 1: one seed has no spread" in line for line in lines)
    assert not (tmp_path / "x").exists()


def test_an_own_optimizer_that_is_not_there(command: tuple[object, ...], tmp_path: Path) -> None:
    place = ("--folder", tmp_path / "x")
    (line,) = refused(disttrain(*command[:2], "--optimizers", "adamw,tests.studies.toys:own_updat", *place))
    assert "did you mean tests.studies.toys:own_update?" in line


def test_not_under_a_launcher(command: tuple[object, ...]) -> None:
    ranks = environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    (line,) = refused(run(sys.executable, "-m", "disttrain", *command, env=ranks))
    assert "call it without a launcher" in line
