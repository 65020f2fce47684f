"""Muon beside AdamW on the quickstart: `python benchmarks/quickstart_curves.py`, about an hour on two cores.

Each optimizer trains `configs/quickstart.toml` at every rate of one grid (same model, data order, tokens, schedule,
weight decay 0.1, clipping at 1); the best rate by validation is then trained with two more seeds. Finished runs are
reused, so it can be stopped and started. Writes results/quickstart_curves.{json,md,svg}. A small model and one grid:
an illustration of what a user sees, no verdict on optimizers.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.plot import line_chart

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs" / "quickstart_curves"
OPTIMIZERS = ("adamw", "muon")
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)


def trained(optimizer: str, rate: float, seed: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run, trained now unless it was before."""
    folder = RUNS / f"{optimizer}-{rate:g}-{seed}"
    status = folder / "status.json"
    if not status.exists() or json.loads(status.read_text())["state"] != "completed":
        overrides = [f"optim.preset={optimizer}", f"optim.lr={rate}", f"train.seed={seed}", f"run.dir={folder}"]
        overrides += ["monitor.evaluate_every=100", "monitor.bigram_baseline=false", "checkpoint.keep_last=1"]
        overrides += ["resilience.anomaly.spikes=false"]
        command = [sys.executable, "-m", "disttrain", "train", "configs/quickstart.toml", *overrides]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    print(f"{optimizer}, rate {rate:g}, seed {seed}: {last_bits_per_byte(rows):.4f} bits per byte", flush=True)
    return rows


def last_bits_per_byte(rows: list[dict[str, Any]]) -> float:
    return [row["validation_bits_per_byte"] for row in rows if "validation_bits_per_byte" in row][-1]


def curve(runs: list[list[dict[str, Any]]]) -> list[tuple[int, float]]:
    """Tokens and validation bits per byte, the mean over seeds."""
    columns: dict[int, list[float]] = {}
    for row in (row for rows in runs for row in rows if "validation_bits_per_byte" in row):
        columns.setdefault(row["tokens"], []).append(row["validation_bits_per_byte"])
    return [(tokens, statistics.mean(values)) for tokens, values in sorted(columns.items())]


def compare(optimizer: str) -> dict[str, Any]:
    grid = {rate: last_bits_per_byte(trained(optimizer, rate, SEEDS[0])) for rate in RATES}
    best = min(grid, key=lambda rate: grid[rate])
    runs = [trained(optimizer, best, seed) for seed in SEEDS]
    ends = [last_bits_per_byte(rows) for rows in runs]
    return {
        "grid": {f"{rate:g}": value for rate, value in grid.items()},
        "best_rate": best,
        "at_the_edge_of_the_grid": best in (RATES[0], RATES[-1]),
        "seeds": ends,
        "mean": statistics.mean(ends),
        "spread": max(ends) - min(ends),
        "curve": curve(runs),
    }


def tokens_to_reach(points: list[tuple[int, float]], level: float) -> float | None:
    """Where the curve first comes down to `level`, between its points by a straight line."""
    for (before, high), (after, low) in pairwise(points):
        if low <= level <= high:
            return before + (after - before) * (high - level) / (high - low)
    return None


def markdown(results: dict[str, Any]) -> str:
    rates = [f"{rate:g}" for rate in RATES]
    lines = ["# Muon beside AdamW on the quickstart", "", f"`{results['command']}`: {results['what']}", ""]
    lines += [f"| validation bits per byte | {' | '.join(rates)} | best rate, {len(SEEDS)} seeds: mean (spread) |"]
    lines += ["|---" * (len(rates) + 2) + "|"]
    for name, row in results["optimizers"].items():
        cells = " | ".join(f"{row['grid'][rate]:.4f}" for rate in rates)
        lines.append(f"| {name} | {cells} | {row['best_rate']:g}: {row['mean']:.4f} ({row['spread']:.4f}) |")
    share = results["share_of_adamws_tokens"]
    said = "does not reach" if share is None else f"reaches with {share:.2f} of the tokens"
    lines += ["", f"What AdamW ends at, Muon {said}.", "", "![curves](quickstart_curves.svg)", ""]
    return "\n".join(lines)


def svg(results: dict[str, Any]) -> str:
    """Both curves, tokens to the right and bits per byte upwards."""
    lines = {f"{name}, rate {row['best_rate']:g}": row["curve"] for name, row in results["optimizers"].items()}
    title = f"validation bits per byte, mean of {len(SEEDS)} seeds"
    return line_chart(title, "training tokens", lines, tick=lambda tokens: f"{tokens / 1e6:.2f}M", dots=True)


def main() -> int:
    optimizers = {name: compare(name) for name in OPTIMIZERS}
    reached = tokens_to_reach(optimizers["muon"]["curve"], optimizers["adamw"]["mean"])
    results = {
        "command": "python benchmarks/quickstart_curves.py",
        "what": "configs/quickstart.toml (1.8 million weights, 1,024,000 tokens of Python's standard library) on two "
        "processes at each rate of one grid with one seed, then the best rate with three; all else is equal",
        "optimizers": optimizers,
        "share_of_adamws_tokens": reached and reached / optimizers["adamw"]["curve"][-1][0],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quickstart_curves.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "quickstart_curves.md").write_text(markdown(results))
    (RESULTS / "quickstart_curves.svg").write_text(svg(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
