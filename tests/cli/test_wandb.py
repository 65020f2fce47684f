"""Weights & Biases with its real client, offline and unreachable, read back from the file that it writes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psutil

from disttrain.monitor.sinks.wandb_file import history, last_recorded_step
from tests.cli.helpers import TRAIN, disttrain, environment, events, full_status, losses, rows, started, wait_for

OFFLINE = ("--nproc", 2, "monitor.wandb.mode=offline", "train.steps=200", "checkpoint.every=40")


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Every row in all files of the run, in the order of files."""
    files = sorted(path for path in folder.glob("wandb/*run-*/*.wandb") if path.parent.name != "latest-run")
    return [{key: json.loads(value) for key, value in row.items()} for file in files for row in history(file)]


DETERMINED = {"tokens", "loss", "grad_norm", "lr", "lr/decay", "clip_scale/decay", "param_rms/decay", "validation_loss"}


def agree(folder: Path, keys: Collection[str] | None = None) -> None:
    """Each step of metrics.jsonl is there exactly once, with the very numbers; where steps were computed again, only
    `keys`, for times differ."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows(folder):
        merged.setdefault(row["step"], {}).update(row)
    there = recorded(folder)
    assert [row["_step"] for row in there] == list(merged)
    for row in there:
        for key, value in merged[row["_step"]].items():
            if not isinstance(value, dict) and (keys is None or key in keys):
                assert row[key] == value, (row["_step"], key)
    assert all("step_seconds_histogram.bins" in row for row in there if "loss" in row)


def reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: (folder / "metrics.jsonl").exists() and max(losses_so_far(folder), default=0) >= step


def losses_so_far(folder: Path) -> list[int]:
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line)["step"])
        except (json.JSONDecodeError, KeyError):
            continue
    return found


def test_every_step_once_over_kills_and_resumes(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = (*TRAIN, config, *OFFLINE, f"run.dir={folder}", "monitor.wandb.tags=['a','b']", "monitor.wandb.group=g")
    with started(*command) as process:
        wait_for(reached(folder, 60), process)
        # All at once, W&B's own process too, which loses the rows that it still holds.
        for victim in psutil.Process(process.pid).children(recursive=True):
            victim.kill()
    lost = last_recorded_step(folder, (folder / "wandb/run_id").read_text().strip())
    with started(*command) as process:
        wait_for(reached(folder, 130), process)
        # Only the first rank: W&B's process writes what it has got, beyond the checkpoint that comes next.
        first = min(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        os.kill(first.pid, signal.SIGKILL)
        process.wait(timeout=60)
    ended = disttrain("train", config, *OFFLINE, f"run.dir={folder}")
    assert ended.code == 0, ended
    agree(folder, DETERMINED)
    assert lost < 130
    assert len({path.name.rsplit("-", 1)[1] for path in folder.glob("wandb/offline-run-*")}) == 1  # one id
    manifest = json.loads((folder / "checkpoints/step-00000200/manifest.json").read_text())
    assert manifest["extra"]["wandb"]["id"] == (folder / "wandb/run_id").read_text().strip()
    # What the kills cost stands beside it.
    assert [event["kind"] for event in events(folder) if event["kind"] in ("start", "resume", "completed")] == [
        "start",
        "resume",
        "resume",
        "completed",
    ]
    status = full_status(folder)
    assert status["lost_seconds"]["recomputed"] > 0
    assert 0 < status["goodput"] < 1


def test_switched_on_later_it_gets_the_rows_from_before(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert disttrain("train", config, "--nproc", 2, "train.steps=20", f"run.dir={folder}").code == 0
    ended = disttrain("train", config, "--nproc", 2, f"run.dir={folder}", "monitor.wandb.mode=offline")
    assert ended.code == 0, ended
    agree(folder)
    samples = [row for row in recorded(folder) if "samples._type" in row or "samples.nrows" in row]
    assert [row["_step"] for row in samples] == [40]


def test_unreachable_it_loses_no_step_and_no_metric(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    settings = ("--nproc", 2, "monitor.wandb.mode=online", "monitor.wandb.start_seconds=2", "train.steps=200")
    ended = disttrain("train", config, *settings, f"run.dir={folder}", env=environment(**nowhere))
    assert ended.code == 0, ended
    assert list(losses(folder)) == list(range(1, 201))
    assert ended.out.count("warning: W&B: ") == 1, ended.out
    assert "recording offline" in ended.out
    agree(folder)


def test_without_a_key_it_records_offline(config: Path, tmp_path: Path) -> None:
    env = environment(HOME=str(tmp_path))
    env.pop("WANDB_API_KEY", None)
    run = (f"run.dir={tmp_path / 'run'}", "monitor.wandb.mode=online", "train.steps=20")
    ended = disttrain("train", config, "--nproc", 1, *run, env=env)
    assert ended.code == 0, ended
    assert "warning: W&B: No API key configured" in ended.out
    agree(tmp_path / "run")
