"""What a run tells to whom: all sinks at once, what harms none of them, profiles, and the run folder's files."""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.cli.helpers import (
    TRAIN,
    checkpoints,
    disttrain,
    environment,
    events,
    finish,
    full_status,
    losses,
    refused,
    rows,
    started,
)
from tests.cli.helpers import (
    run as run_process,
)


def test_rows_tell_where_time_and_memory_go(finished_folder: Path) -> None:
    logged = [row for row in rows(finished_folder) if "loss" in row]
    for row in logged:
        own = sum(row[f"{part}_seconds"] for part in ("data", "forward", "backward", "optimizer"))
        assert 0 < own < 1.5 * row["step_seconds"]
        assert row["communication_seconds"] > 0
        # The other rank has been waiting for the first one to begin, before whose step that was.
        assert row["step"] == 1 or own + row["communication_seconds"] < 1.5 * row["step_seconds"]
        assert sum(row["step_seconds_histogram"]["counts"]) == 2  # one step of each of two ranks
        assert row["host_rss_bytes"] > 1e7
        assert 0 < row["goodput"] <= 1
        assert "mfu" not in row  # nobody knows the peak of this processor
        for group in ("decay", "no_decay"):
            assert row[f"param_rms/{group}"] > 0
            assert row[f"update_rms/{group}"] > 0
    # Adam's steps are about as long as the rate, whatever the gradients are.
    assert logged[-1]["update_rms/decay"] < 10 * logged[-1]["lr/decay"]
    steps = [row["step"] for row in rows(finished_folder)]
    assert steps == sorted(steps)
    times = [row["unix_seconds"] for row in rows(finished_folder)]
    assert times == sorted(times)


def test_the_folder_tells_what_it_ran_on_and_what_happened(finished_folder: Path) -> None:
    environment = json.loads((finished_folder / "environment.json").read_text())
    assert environment["world"] == 2
    assert "train" in environment["command"]
    assert [event["kind"] for event in events(finished_folder)] == ["start", "checkpoint", "checkpoint", "completed"]
    assert [event["step"] for event in events(finished_folder)][-1] == 40
    status = full_status(finished_folder)
    assert status["wall_seconds"] >= status["productive_seconds"] + sum(status["lost_seconds"].values()) - 1e-6
    assert set(status["lost_seconds"]) >= {"startup", "evaluation", "checkpoint", "finish"}


def test_a_stated_peak_gives_a_utilisation(config: Path, tmp_path: Path) -> None:
    settings = ("monitor.peak_flops_per_device=1e9", "monitor.rank_metrics=true", "train.steps=5", "train.nproc=2")
    ended = disttrain("train", config, *settings, f"run.dir={tmp_path}")
    assert ended.code == 0, ended
    assert "MFU" in ended.out
    for row in rows(tmp_path):
        if "loss" in row:
            assert row["mfu"] == pytest.approx(row["model_flops_per_second"] / 2e9)
            own = [row[f"rank/{rank}/own_step_seconds"] for rank in range(2)]
            assert all(0 < seconds <= 1.5 * row["step_seconds"] for seconds in own)
            assert row["host_rss_bytes"] == max(row[f"rank/{rank}/host_rss_bytes"] for rank in range(2))


def test_all_sinks_at_once_show_the_same_numbers(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sinks = ("monitor.wandb.mode=offline", "monitor.tensorboard.enabled=true", "monitor.prometheus.port=0")
    with started(*TRAIN, config, "--nproc", 2, f"run.dir={folder}", *sinks, "train.steps=100") as process:
        assert process.stdout
        for line in process.stdout:
            if found := re.search(r"Prometheus: (http://127\.0\.0\.1:\d+/metrics)", line):
                break
        else:
            pytest.fail("no address of Prometheus")
        seen = 0.0
        while seen < 10:
            time.sleep(0.02)
            with urllib.request.urlopen(found[1], timeout=10) as answer:
                numbers = dict(
                    re.findall(r"^disttrain_(\w+)\{run=\"run\"\} (\S+)$", answer.read().decode(), re.MULTILINE)
                )
            seen = float(numbers.get("step", 0))
        ended = finish(process)
    assert ended.code == 0, ended
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected = losses(folder)
    assert float(numbers["loss"]) in expected.values()
    shown = {event.step: event.value for event in board.Scalars("loss")}
    assert shown == pytest.approx(expected, rel=1e-6)  # TensorBoard keeps fp32
    validations = {row["step"]: row["validation_loss"] for row in rows(folder) if "validation_loss" in row}
    assert {event.step: event.value for event in board.Scalars("validation_loss")} == pytest.approx(validations)


def test_a_port_that_is_taken_costs_a_warning(config: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = (f"run.dir={tmp_path}", f"monitor.prometheus.port={port}", "train.steps=20", "--nproc", 1)
        ended = disttrain("train", config, *run)
    assert ended.code == 0, ended
    assert "warning: Prometheus: switched off: [Errno 98] Address already in use" in ended.out
    assert [event["kind"] for event in events(tmp_path)].count("warning") == 1
    assert list(losses(tmp_path)) == list(range(1, 21))


def test_a_profile(config: Path, tmp_path: Path) -> None:
    run = ("--nproc", 2, f"run.dir={tmp_path}", "profile.steps=[3,4]", "train.steps=8")
    ended = disttrain("train", config, *run)
    assert ended.code == 0, ended
    summary = json.loads((tmp_path / "trace/summary.json").read_text())
    assert (summary["steps"], summary["world"], len(summary["operators"])) == ([3, 4], 2, 10)
    assert 0 <= summary["exposed_communication_seconds"] <= summary["communication_seconds"]
    assert summary["step_seconds"] > 0
    assert "profile of steps 3 to 4" in ended.out
    assert ended.err == ""  # torch's tracer would write there
    for rank in range(2):
        names = {e.get("name") for e in json.loads((tmp_path / f"trace/rank-{rank}.json").read_text())["traceEvents"]}
        assert "aten::mm" in names


def test_a_stop_is_an_event(config: Path, tmp_path: Path) -> None:
    with started(*TRAIN, config, "--nproc", 2, f"run.dir={tmp_path}", "train.steps=100000") as process:
        while not checkpoints(tmp_path):
            time.sleep(0.05)
            assert process.poll() is None
        process.terminate()
        assert finish(process).code == 75
    kinds = [event["kind"] for event in events(tmp_path)]
    assert (kinds[0], kinds[-1]) == ("start", "stop")


def test_a_failure_is_an_event(config: Path, tmp_path: Path) -> None:
    run = ("--nproc", 2, f"run.dir={tmp_path}", "optim.lr=1e38", "monitor.wandb.mode=offline")
    ended = disttrain("train", config, *run, "schedule.warmup_steps=0")
    assert ended.code == 1, ended
    (failed,) = [event for event in events(tmp_path) if event["kind"] == "failed"]
    assert "not finite" in failed["text"]
    # An alert is in W&B's file too.
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"failed at step" in file.read_bytes()


def test_refused(config: Path, tmp_path: Path, no_torch: dict[str, str]) -> None:
    run = (config, f"run.dir={tmp_path}")
    (line,) = refused(disttrain("train", *run, "monitor.prometheus.address=0.0.0.0", env=no_torch))
    assert "set token_file" in line
    missing = ("monitor.prometheus.address=0.0.0.0", "monitor.prometheus.token_file=nowhere")
    (line,) = refused(disttrain("train", *run, "monitor.prometheus.port=0", *missing, env=no_torch))
    assert "monitor.prometheus.token_file = nowhere: No such file or directory" in line
    (line,) = refused(disttrain("train", *run, "profile.steps=[5,3]", env=no_torch))
    assert "comes after" in line


def test_a_package_that_is_not_there(config: Path, tmp_path: Path) -> None:
    """As where only the core is installed: every missing package in one answer."""
    hook = tmp_path / "hidden" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name in ('wandb', 'tensorboard') else found(name, package)\n"
    )
    plain = environment()
    env = plain | {"PYTHONPATH": f"{hook.parent}:{plain['PYTHONPATH']}"}
    run = (config, f"run.dir={tmp_path / 'run'}", "monitor.wandb.mode=online", "monitor.tensorboard.enabled=true")
    # A process of its own: forks do not run sitecustomize.
    lines = refused(run_process(sys.executable, "-m", "disttrain", "train", *run, env=env))
    assert ["pip install 'disttrain[wandb]'" in lines[0], "pip install 'disttrain[tensorboard]'" in lines[1]] == [
        True
    ] * 2
