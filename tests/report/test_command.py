"""`disttrain report`: where it writes, how it refuses, and that it needs no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.cli.report import report_command
from disttrain.errors import UserError
from tests.cli.helpers import ROOT, disttrain, environment, refused


def test_one_run_is_written_into_its_folder(runs: tuple[Path, ...], no_torch: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "run")
    ended = disttrain("report", folder, env=no_torch)
    assert (ended.code, ended.err) == (0, "")
    assert f"{folder / 'report.html'}: " in ended.out
    assert " MB, 1 run, " in ended.out
    assert "<title>gpt-124m-muon</title>" in (folder / "report.html").read_text()
    assert not list(folder.glob("*.tmp"))


def test_several_runs_are_written_here(runs: tuple[Path, ...], no_torch: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "disttrain", "report", *map(str, runs), "--title", "Three <runs>"]
    done = subprocess.run(command, cwd=tmp_path, env=no_torch, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("report.html: ")
    assert "<title>Three &lt;runs&gt;</title>" in (tmp_path / "report.html").read_text()


def test_an_earlier_report_is_replaced(runs: tuple[Path, ...], tmp_path: Path) -> None:
    output = tmp_path / "old.html"
    output.write_text("old")
    assert disttrain("report", runs[2], "--output", output).code == 0
    assert output.stat().st_size > 10**6


def test_bad_input(runs: tuple[Path, ...], no_torch: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.json").write_text(json.dumps({"run": {"name": "fresh"}}))
    (fresh / "metrics.jsonl").touch()
    paths = (tmp_path / "nowhere", tmp_path / "empty", fresh, runs[0], runs[0])
    lines = refused(disttrain("report", *paths, "--output", tmp_path / "no" / "r.html", env=no_torch))
    words = ("no such folder", "no run folder", "no metrics yet", "given twice", "there is no folder")
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert line.startswith("error: ")
        assert word in line


@pytest.mark.parametrize("arguments", [[], ["--nosuch"], ["x", "--output"]])
def test_wrong_use(arguments: list[str], no_torch: dict[str, str]) -> None:
    refused(disttrain("report", *arguments, env=no_torch))


def test_where_nothing_can_be_written(runs: tuple[Path, ...], no_torch: dict[str, str], tmp_path: Path) -> None:
    [line] = refused(disttrain("report", runs[0], "--output", f"{tmp_path}/{'x' * 300}.html", env=no_torch))
    assert "name another file" in line or "--output to another file" in line
    [line] = refused(disttrain("report", runs[0], "--output", tmp_path, env=no_torch))
    assert f"--output {tmp_path}: is a folder" in line
    # A folder in the way of the temporary file refuses everybody, root too.
    (tmp_path / "r.html.tmp").mkdir()
    [line] = refused(disttrain("report", runs[0], "--output", tmp_path / "r.html", env=no_torch))
    assert "r.html: cannot be written" in line
    assert not (tmp_path / "r.html").exists()


def test_a_folder_that_may_not_be_written(runs: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"report.html: the folder .* is not writable; set --output"):
        report_command([runs[2]])
    assert not (runs[2] / "report.html").exists()


def test_without_plotly(runs: tuple[Path, ...], no_plotly: dict[str, str], tmp_path: Path) -> None:
    [line] = refused(disttrain("report", runs[0], "--output", tmp_path / "r.html", env=no_plotly))
    assert "pip install 'disttrain[report]'" in line


def test_the_room_brings_in_neither_torch_nor_plotly() -> None:
    code = "import sys, disttrain.report, disttrain.cli.report; print(*({'torch', 'plotly'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")
