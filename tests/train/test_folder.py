"""The run folder: its lock and its state."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from disttrain.config.load import load_config
from disttrain.errors import UserError
from disttrain.train.folder import RunFolder

OWNER = """
import os, sys
from pathlib import Path
from disttrain.train.folder import RunFolder
with RunFolder(Path(sys.argv[1])).owned():
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""
ROOT = Path(__file__).parents[2]


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    command = [sys.executable, "-c", OWNER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin
        assert owner.stdout
        pid = owner.stdout.readline().strip()
        with (
            pytest.raises(UserError, match=rf"process {pid} on .* is running here; .*run\.name"),
            RunFolder(path).owned(),
        ):
            pytest.fail("two owners")
        owner.kill()  # as it goes, so goes its lock
    with RunFolder(path).owned():
        assert (path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with RunFolder(path).owned():
        pass


def test_two_owners_in_one_process(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.owned(), pytest.raises(UserError, match="is running here"), folder.owned():
        pytest.fail("two owners")


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be the run folder: .*; set run\.dir"), RunFolder(path).owned():
            pytest.fail("no folder")


def test_status(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_status() == {}
    folder.write_status("running", 3)
    assert folder.read_status() == {"state": "running", "step": 3}
    for broken in ("", "{", "[1]"):
        (tmp_path / "status.json").write_text(broken)
        assert folder.read_status() == {}
    folder.write_status("failed", 4)
    assert folder.read_status() == {"state": "failed", "step": 4}


def test_status_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status("running", 1)
    seen = []
    write_text = Path.write_text

    def half(path: Path, text: str, **options: str) -> int:
        """As a full disk or a kill leaves a file."""
        write_text(path, text[: len(text) // 2], **options)
        seen.append(folder.read_status())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        folder.write_status("completed", 2)
    assert seen == [{"state": "running", "step": 1}]
    assert folder.read_status() == {"state": "running", "step": 1}


def test_config_can_be_loaded_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nsteps = 3\n[model]\nn_layers = 2\n[optim]\nbetas = [0.5, 0.75]\n")
    config = load_config(file, []).config
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_config(config)
    again = load_config(folder.path, []).config
    assert again.run_dir == folder.path
    assert again.model_copy(update={"run": config.run}) == config
    assert json.loads(folder.config.read_text())["run"]["name"] == "mine"


def test_samples_are_added(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.add_sample(1, "one")
    folder.add_sample(2, "zwei \u00e4")
    assert (tmp_path / "samples.txt").read_text(encoding="utf-8") == "--- step 1\none\n--- step 2\nzwei \u00e4\n"


def test_a_lock_that_is_given_back_in_a_moment_is_waited_for(tmp_path: Path) -> None:
    """As by a process that has just been killed, whose threads are not all gone yet."""
    holder = (tmp_path / ".lock").open("a+")
    fcntl.flock(holder, fcntl.LOCK_EX)
    timer = threading.Timer(0.5, holder.close)
    timer.start()
    with RunFolder(tmp_path).owned():
        assert holder.closed
    timer.join()
