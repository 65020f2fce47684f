"""The trials behind `benchmarks/faults.py run`: real runs on gloo, with faults at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from checkpoint_faults import Row

from disttrain.checkpoint.manifest import committed_steps
from disttrain.testing.commands import Command, wait_until
from disttrain.testing.injection import samples_read
from disttrain.testing.tiny import write_tiny

PATIENCE_SECONDS = 120.0
INJECTION = ("disttrain.testing.injection:install",)
CONFIG = """
[train]
steps = 1000000
[schedule]
horizon_steps = 1000
[checkpoint]
every = 10
[monitor]
evaluate_every = 25
[resilience]
max_restarts = 1000
hang_seconds = 3
slow_rank_factor = 100
"""
ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = (("fsdp",), ("ddp",), ("zero1",), ("hsdp", "parallel.dp_replicate=2"))
# Of three and more ranks the order matters in which their parts are added.
NPROC = {"fsdp": 2, "ddp": 4, "zero1": 2, "hsdp": 4}


class Trial:
    """One run folder and the command that trains in it, started as often as a scheduler would."""

    def __init__(self, folder: Path, settings: tuple[str, ...] = (), nproc: int = 2) -> None:
        self.home, self.folder, self.settings, self.nproc = folder, folder / "run", settings, nproc
        folder.mkdir(parents=True)
        self.config = write_tiny(folder, CONFIG, cache=folder.parent / "cache")

    def start(self, *more: str) -> Command:
        keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
        environment = keep | {"OMP_NUM_THREADS": "1", "FAULTS": str(self.home)}
        arguments = ["train", str(self.config), "--nproc", str(self.nproc), f"run.dir={self.folder}"]
        self.command = Command([*arguments, *self.settings, *more], self.home, environment, INJECTION)
        return self.command

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_lines(self.folder, "metrics.jsonl") if "loss" in row}

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_lines(self.folder, "events.jsonl") if event["kind"] == kind]

    def status(self) -> Mapping[str, Any]:
        try:
            return json.loads((self.folder / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def training_since(self, moment: float) -> bool:
        """The ranks were started after `moment` (Unix time), and have taken a step."""
        rows, starts = read_lines(self.folder, "metrics.jsonl"), self.events("start") + self.events("resume")
        started = max((start["unix_seconds"] for start in starts), default=0.0)
        return bool(rows) and rows[-1]["unix_seconds"] > started > moment

    def wait_for_training(self, moment: float) -> bool:
        wait_until(lambda: self.training_since(moment) or self.command.poll() is not None, PATIENCE_SECONDS)
        return self.training_since(moment)

    def said(self) -> str:
        """The ends of what it printed, with no path of this machine in it."""
        text = " | ".join((self.home / name).read_text()[-300:] for name in ("stdout", "stderr"))
        return text.replace(str(ROOT), ".").replace(str(self.home), "HOME")


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The whole lines of a run's file of JSON lines."""
    path = folder / name
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def compare(trial: Trial, reference: Mapping[int, float], steps: int, tolerance: float = 0.0) -> str:
    """An empty string, or what differs between the trace of `steps` steps and the uninterrupted one."""
    losses = trial.losses()
    if list(losses) != list(range(1, steps + 1)):
        return f"{len(losses)} rows, the last of step {max(losses, default=0)}, of {steps} steps"
    worst = max(abs(losses[step] - reference[step]) / abs(reference[step]) for step in losses)
    return "" if worst <= tolerance else f"losses differ by {worst:.1e}"


def exit_code(command: Command) -> int | None:
    """None where it does not end in time."""
    wait_until(lambda: command.poll() is not None, PATIENCE_SECONDS)
    return command.poll()


def undisturbed(home: Path, settings: tuple[str, ...], steps: int, nproc: int = 2) -> Trial:
    trial = Trial(home, settings, nproc)
    trial.start(f"train.steps={steps}").wait(1800)
    return trial


# kill -9.


def kills(home: Path, trials: int, rng: random.Random, per_run: int = 10) -> Row:
    """One rank, all ranks and the launcher in turn; in every fifth run the world size changes with the launcher."""
    row = Row("kill -9 of a rank, all ranks, the launcher")
    run = 0
    while row.trials < trials:
        elastic, layout = run % 5 == 4, LAYOUTS[run % 5 % len(LAYOUTS)]
        settings = (f"parallel.strategy={layout[0]}", *layout[1:])
        trial = Trial(home / f"kill-{run}", settings, nproc=NPROC[layout[0]])
        count = min(per_run, trials - row.trials)
        problem = _kill_run(trial, count, rng, elastic, row)
        for index in range(count):
            row.add(f"run {run}, kill {index}", problem)
        run += 1
    return row


def _kill_run(trial: Trial, count: int, rng: random.Random, elastic: bool, row: Row) -> str:
    command = trial.start()
    try:
        moment = 0.0
        for index in range(count):
            if not trial.wait_for_training(moment):
                return f"kill {index}: it did not go on: {trial.said()}"
            # Sometimes in the middle of training, sometimes while ranks start.
            time.sleep(rng.uniform(0.0, 1.5))
            who = "launcher" if elastic else ("rank", "ranks", "launcher")[index % 3]
            moment = time.time()
            kill(command, who, rng)
            row.counts[f"{who}{' and another world size' * elastic}"] += 1
            if who == "launcher":
                if not wait_until(lambda c=command: not c.session(), 30.0):
                    return f"kill {index}: ranks outlive their launcher: {command.session()}"
                trial.nproc = rng.choice([n for n in (1, 2, 4) if n != trial.nproc]) if elastic else trial.nproc
                command = trial.start()
        if not trial.wait_for_training(moment):
            return f"it did not go on: {trial.said()}"
        (trial.folder / "STOP").touch()
        code = exit_code(command)
        if code != 75 or command.session():
            return f"exit code {code}, left over {command.session()}: {trial.said()}"
    finally:
        command.end()
    steps = trial.status()["step"]
    nproc = 2 if elastic else trial.nproc
    reference = undisturbed(trial.home.parent / f"{trial.home.name}-undisturbed", trial.settings, steps, nproc)
    if samples_read(trial.home, 8 * steps) != samples_read(reference.home, 8 * steps):
        return "other samples were read"
    row.counts["steps compared"] += steps
    return compare(trial, reference.losses(), steps, 1e-6 if elastic else 0.0)


def kill(command: Command, who: str, rng: random.Random) -> None:
    if who == "launcher":
        command.send_signal(signal.SIGKILL)
        return
    wait_until(command.ranks, PATIENCE_SECONDS)
    ranks = command.ranks()
    for process in ranks if who == "ranks" else [rng.choice(ranks)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


# Stops.


def stops(home: Path, trials: int, rng: random.Random) -> Row:
    """By every signal and by a file, in warm-up, between steps, in evaluation and saving; half of them twice."""
    row = Row("a request to stop")
    trial = Trial(home / "stops")
    for index in range(trials):
        before = len(trial.events("start") + trial.events("resume"))
        command = trial.start()
        try:
            began = wait_until(lambda n=before: len(trial.events("start") + trial.events("resume")) > n, 60.0)
            time.sleep(rng.uniform(0.0, 1.0))
            way = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "STOP")[index % 5]
            for _ in range(1 + index % 2):
                if way == "STOP":
                    (trial.folder / "STOP").touch()
                else:
                    command.send_signal(getattr(signal, way))
                time.sleep(rng.uniform(0.0, 0.2))
            code = exit_code(command)
            row.counts[way] += 1
            status, saved = trial.status(), committed_steps(trial.folder / "checkpoints")
            whole = saved and saved[0].name == f"step-{status.get('step', -1):08d}"
            if not began or code != 75 or status.get("state") != "preempted" or not whole or command.session():
                row.add(f"{way}, trial {index}", f"code {code}, {status}: {trial.said()}")
            else:
                row.add(way, "")
        finally:
            command.end()
    steps = trial.status()["step"]
    reference = undisturbed(home / "stops-undisturbed", (), steps)
    if problem := compare(trial, reference.losses(), steps):
        row.failures.append(f"the trace of all stops together: {problem}")
        row.passed = 0
    row.counts["steps compared"] += steps
    return row
