"""What watching a run costs, and what it costs when nobody answers: `python benchmarks/monitoring.py`, minutes.

1. A GPT of 5.9 million parameters under fsdp on two gloo ranks. Windows of ten steps, in turn without any measuring
   (the bare `train_step`) and as `disttrain train` does them: clock, sizes of updates, one row at the end of the window
   to console, metrics.jsonl, W&B (offline), TensorBoard and Prometheus together. The cost is the ratio of two windows
   that follow each other, less one: of wall time, and of what both ranks' threads and W&B's process worked, which other
   work on the machine disturbs less. A third kind of window is bare again: what it shows is noise. Beside it what can
   be counted without noise: the seconds of the calls themselves on the training thread, and the processor time of the
   sinks' threads and W&B's process, over that of the windows.
2. `disttrain train` for 1,000 steps with W&B online at an address where nobody listens: every step must be in
   metrics.jsonl and in the file that W&B's client leaves for later, with the same numbers.

Writes results/monitoring.{json,md}; exits 1 when a step or a number is missing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from disttrain.config.load import load_config
from disttrain.distributed.env import Ranks
from disttrain.monitor.sinks.wandb_file import history
from disttrain.optim.noise_scale import NoiseScale
from disttrain.testing import RankPool
from disttrain.testing.tiny import write_tiny
from disttrain.train.build import build_training
from disttrain.train.measurements import Measurements
from disttrain.train.output import RunOutput
from disttrain.train.position import Position
from disttrain.train.preflight import prepare_run
from disttrain.train.run_time import resume_time
from disttrain.train.step import train_step

RESULTS = Path(__file__).resolve().parent / "results"
CPU = torch.device("cpu")
WINDOW = 10
KINDS = ("bare", "watched", "bare again")
MODEL = """
device = "cpu"
[model]
n_layers = 6
d_model = 256
n_heads = 4
vocab_size = 4096
[data]
source = "synthetic"
cache_dir = "{folder}/cache"
[train]
steps = 100000
global_batch_tokens = 1024
microbatch_size = 2
sequence_length = 256
[monitor]
noise_scale_every = 0
wandb.mode = "offline"
tensorboard.enabled = true
prometheus.port = 0
"""
CONFIG = """
[train]
steps = 1000
[schedule]
horizon_steps = 1000
[checkpoint]
every = 1000
[monitor]
evaluate_every = 100
[monitor.wandb]
mode = "online"
start_seconds = 10
"""


# What ranks do.


class Watched:
    """One rank's run, whose steps can be taken with and without being watched."""

    def __init__(self, rank: int, world: int, folder: str) -> None:
        config = load_config(Path(folder) / "model.toml", [f"run.dir={folder}/run"]).config
        run, ranks = prepare_run(config), Ranks(rank, world, rank, world)
        self.config, self.parts = run.config, build_training(run.config, run.data, ranks, CPU)
        self.time = resume_time(time.time(), {}, {})
        self.measured = Measurements(run.config, self.parts, ranks, CPU, self.time, NoiseScale(CPU), 0)
        self.output = RunOutput(run, ranks, CPU, self.time, None, config.train.total_steps, [])
        self.step = self.samples = 0
        self.calls = 0.0

    def window(self, kind: str) -> None:
        for index in range(WINDOW):
            logging, clock = index == WINDOW - 1, self.measured.clock
            watched = kind == "watched"
            if watched:
                began = time.perf_counter()
                self.measured.before(logging)
                self.calls += time.perf_counter() - began
                clock.start()
            batches = self.parts.loader.microbatches(self.samples, 4)
            tensors = [(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)) for batch in batches]
            if not watched:
                train_step(self.parts.engine, tensors, lr_factor=0.1, device=CPU)
            else:
                clock.lap("data")
                result = train_step(self.parts.engine, tensors, lr_factor=0.1, device=CPU, lap=clock.lap)
                began = time.perf_counter()
                clock.stop()
                self.measured.after(result)
                self.calls += time.perf_counter() - began
            self.step, self.samples = self.step + 1, self.samples + 4
        if kind == "watched":
            # The row's one collective waits for the other rank; that is not the row's doing.
            dist.barrier()
            began = time.perf_counter()
            self.output.reached(self.step, self.samples * 256)
            position = Position(self.step, self.samples, self.samples * 256)
            row = self.measured.row(result, position, steps_left=1, batch_tokens=1024)
            self.output.log(row)
            self.calls += time.perf_counter() - began


def measure(rank: int, world: int, rounds: int, folder: str) -> dict[str, Any]:
    """Seconds of each window, wall and worked by this rank and its children."""
    with redirect_stdout(io.StringIO()):
        run = Watched(rank, world, folder)
        for kind in (*KINDS, *KINDS):
            run.window(kind)
        # W&B's start is over before anything is counted.
        time.sleep(5)
        run.calls, beside = 0.0, seconds_beside()
        wall: dict[str, list[float]] = {kind: [] for kind in KINDS}
        worked: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for index in range(rounds):
            for kind in KINDS[index % 3 :] + KINDS[: index % 3]:
                dist.barrier()
                began, busy = time.perf_counter(), processor_seconds()
                run.window(kind)
                dist.barrier()
                wall[kind].append(time.perf_counter() - began)
                worked[kind].append(processor_seconds() - busy)
        beside = seconds_beside() - beside
        run.output.leave("completed")
    return {"wall": wall, "worked": worked, "calls": run.calls, "beside": beside}


def processor_seconds() -> float:
    return time.process_time() + _of_children()


def seconds_beside() -> float:
    """Processor time of the sinks' threads and of the processes that they started."""
    names = {thread.native_id for thread in threading.enumerate() if thread.name.startswith(("sink-", "prometheus"))}
    threads = [thread for thread in psutil.Process().threads() if thread.id in names]
    return sum(thread.user_time + thread.system_time for thread in threads) + _of_children()


def _of_children() -> float:
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in children)


# What the command does.


def cost(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, RankPool() as pool:
        (Path(folder) / "model.toml").write_text(MODEL.format(folder=folder))
        ranks = pool.run(
            f"{__spec__.name if __spec__ else 'benchmarks.monitoring'}:measure",
            2,
            3000.0,
            **{
                "rounds": rounds,
                "folder": folder,
            },
        )
    found = {}
    for name, series in (
        ("wall time", ranks[0]["wall"]),
        ("processor time", {k: [a + b for a, b in zip(*(r["worked"][k] for r in ranks), strict=True)] for k in KINDS}),
    ):
        for kind in KINDS[1:]:
            ratios = [100 * (a / b - 1) for a, b in zip(series[kind], series["bare"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            found[f"{kind}, {name}"] = {"median": middle, "quartiles": [low, high]}
    wall = sum(ranks[0]["wall"]["watched"])
    worked = sum(sum(rank["worked"]["watched"]) for rank in ranks)
    counted = {
        "calls on rank 0, of wall time": 100 * ranks[0]["calls"] / wall,
        "threads and processes beside, of processor time": 100 * sum(rank["beside"] for rank in ranks) / worked,
    }
    return {"rounds": rounds, "percent": found, "counted_percent": counted}


def unreachable() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config, run = write_tiny(Path(folder), CONFIG), Path(folder) / "run"
        env = os.environ | {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
        command = [sys.executable, "-m", "disttrain", "train", str(config), "--nproc", "2", f"run.dir={run}"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        files = [path for path in run.glob("wandb/*run-*/*.wandb") if path.parent.name != "latest-run"]
        sent = [{key: json.loads(value) for key, value in row.items()} for file in files for row in history(file)]
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    numbers = [
        (row["_step"], key)
        for row in sent
        for key in merged[row["_step"]]
        if not isinstance(merged[row["_step"]][key], dict)
    ]
    by_step = {row["_step"]: row for row in sent}
    differing = [pair for pair in numbers if by_step[pair[0]].get(pair[1]) != merged[pair[0]][pair[1]]]
    return {
        "exit_code": done.returncode,
        "steps_in_metrics_jsonl": len(merged),
        "steps_in_wandb_file": len(sent),
        "steps_twice": len(sent) - len(by_step),
        "numbers_compared": len(numbers),
        "numbers_that_differ": len(differing),
        "warnings": [line for line in done.stdout.splitlines() if line.startswith("warning")],
    }


def markdown(report: dict[str, Any]) -> str:
    cost, lost = report["cost"], report["unreachable"]
    paired = [
        f"| {name} | {row['median']:+.2f} | {row['quartiles'][0]:+.2f} to {row['quartiles'][1]:+.2f} |"
        for name, row in cost["percent"].items()
    ]
    counted = [f"| counted: {name} | {percent:+.2f} | |" for name, percent in cost["counted_percent"].items()]
    return f"""# What watching a run costs

`python benchmarks/monitoring.py --rounds {cost["rounds"]}`, two gloo ranks on a shared machine: percent of a bare step.

| | median | quartiles |
|---|---|---|
{chr(10).join(paired + counted)}

Counted beside is an upper bound: it goes on in bare windows too. W&B unreachable for 1,000 steps:
{lost["steps_in_metrics_jsonl"]:,} steps in metrics.jsonl, {lost["steps_in_wandb_file"]:,} in W&B's own file,
{lost["steps_twice"]} twice; of {lost["numbers_compared"]:,} numbers {lost["numbers_that_differ"]} differ.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    report = {"cost": cost(rounds), "unreachable": unreachable()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "monitoring.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "monitoring.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    lost = report["unreachable"]
    complete = lost["steps_in_metrics_jsonl"] == lost["steps_in_wandb_file"] == 1000
    return int(not complete or lost["exit_code"] != 0 or bool(lost["steps_twice"] + lost["numbers_that_differ"]))


if __name__ == "__main__":
    sys.exit(main())
