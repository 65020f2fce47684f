"""What checkpoints and runs survive: `python benchmarks/faults.py checkpoints|run|soak [--quick]`.

`checkpoints`, minutes on two cores.

Two checkpoints of one run lie in a folder, written by several ranks. Each trial harms the newer one, or ends the ranks
that save it, or lets the disk run full; then a fresh reader loads. Expected of

- damage and hostile files: the newer one is named with the reason, and the older one's very bits are loaded;
- kill -9: the last checkpoint that a rank was told of, or a newer one, whole, from one step; every directory that looks
  like a checkpoint verifies, and the next save clears the rest. `save cut short` counts the trials that hit a save;
- a full disk: one line with place, needed and free bytes, the same on every rank, and the older one loads; a save that
  fits succeeds.

`run`, about half an hour: real runs of `disttrain train` on gloo, forked from a server that has imported torch.

- kill -9 of one rank, all ranks, the launcher: it trains again by itself (after the launcher's death: by the same
  command), the losses are those of an uninterrupted run to the bit (to 1e-6 where the world size changed), and so are
  the samples that were read; no process is left;
- NaN, Inf and spikes: left out at that step, and no other; a weight that is not finite: back to the checkpoint;
- requests to stop: exit code 75 with a committed checkpoint of that step;
- dead ranks: peers gone within 5 s, training again within 15 s at the first restart, no orphans; hung ranks: named.

`soak`, an hour: a fault a minute in one run, which ends with the weights and optimizer state of a clean run.

Writes results/{checkpoint,run,soak}_faults.json and .md, with --quick or when a trial fails only where --json
says. Exits 1 when one fails.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint_crashes import full_disks, kills
from checkpoint_faults import (
    JOBS,
    Damage,
    Row,
    bit_flips,
    hostile_files,
    missing_files,
    swapped_files,
    truncations,
    zeroed_pages,
)
from checkpoint_speed import measure, speed_lines
from run_faults import kills as run_kills
from run_faults import stops
from run_hangs import bad_numbers, comparison_cost, dead_ranks, hung_ranks
from run_soak import soak

from disttrain.testing import RankPool
from disttrain.testing.checkpoints import LARGE_ROWS, OTHER_RUN, SMALL_ROWS

RESULTS = Path(__file__).resolve().parent / "results"


def campaign(quick: bool, seed: int) -> Iterator[Row]:
    """Every kind of fault, a row each as soon as it is counted."""

    def count(trials: int) -> int:
        return max(4, trials // 25) if quick else trials

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as name, RankPool(4) as pool:
        folder = Path(name)
        # First of all: a fork wants a process in which nothing has run yet.
        yield kills(count(100), rng)
        small = Damage.saved(pool, folder / "small", 4, SMALL_ROWS)
        large = Damage.saved(pool, folder / "large", 2, LARGE_ROWS)
        pool.run(f"{JOBS}:save_pair", 4, directory=folder / "other", rows=SMALL_ROWS, run_id=OTHER_RUN)
        yield bit_flips(small, count(1000), rng)
        yield zeroed_pages(large, count(200), rng)
        yield truncations(small, count(100), rng)
        yield swapped_files(small, Damage(folder / "other", SMALL_ROWS), count(50), rng)
        yield missing_files(small, count(50), rng)
        yield hostile_files(small)
        yield full_disks(pool, count(30))


PARTS = ("kills", "stops", "dead", "hung", "numbers", "cost")


def run_campaign(quick: bool, seed: int, only: str = "") -> Iterator[Row]:
    """Faults of real runs, a row each as soon as it is counted; one of the `PARTS`, or all."""

    def count(trials: int) -> int:
        return max(3, trials // 25) if quick else trials

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        trials = {"kills": (run_kills, 200), "stops": (stops, 50), "dead": (dead_ranks, 50), "hung": (hung_ranks, 30)}
        for part, (function, number) in trials.items():
            if only in ("", part):
                yield function(folder, count(number), rng)
        with RankPool(4) as pool:
            if only in ("", "numbers"):
                yield from bad_numbers(folder, pool, count(50), rng)
            if only in ("", "cost"):
                yield comparison_cost(pool, rounds=3 if quick else 15)


def soak_campaign(quick: bool, seed: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        yield soak(Path(name), 10 if quick else 60, random.Random(seed), apart_seconds=15.0 if quick else 60.0)


CAMPAIGNS: dict[str, Callable[..., Iterator[Row]]] = {
    "checkpoints": campaign,
    "run": run_campaign,
    "soak": soak_campaign,
}


def markdown(report: dict[str, Any]) -> str:
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in report["faults"]))
    lines = [
        f"Made by {commands} with torch {report['torch']}; `benchmarks/faults.py` says what is expected.",
        "",
        "| fault | trials | as expected | of them |",
        "|---|---|---|---|",
    ]
    for row in report["faults"]:
        counts = ", ".join(f"{name} {number:,}" for name, number in row["counts"].items())
        lines.append(f"| {row['fault']} | {row['trials']:,} | {row['passed']:,} | {row['not_run'] or counts} |")
    return "\n".join([*lines, *(["", *speed_lines(report["speed"])] if report["speed"] else [])]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="What checkpoints and runs survive, counted, and what that costs.")
    parser.add_argument("what", choices=list(CAMPAIGNS))
    parser.add_argument("--quick", action="store_true", help="about a twenty-fifth of the trials")
    parser.add_argument("--json", type=Path, help="where the results go; a table lies beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARTS, default="", help="this part of `run`; other rows of the file stay")
    options = parser.parse_args()
    if options.only and options.what != "run":
        parser.error(f"--only chooses a part of `run`; `{options.what}` has none")
    chosen = {"only": options.only} if options.only else {}
    # Ranks are forked, and a fork of a process that used two threads hangs in its first such operation.
    torch.set_num_threads(1)
    rows: list[Row] = []
    for row in CAMPAIGNS[options.what](options.quick, options.seed, **chosen):
        rows.append(row)
        print(f"{row.fault}: {row.passed:,} of {row.trials:,} {row.not_run}", flush=True)
        for failure in row.failures:
            print(f"  {failure}", file=sys.stderr)
    speed = None
    if options.what == "checkpoints":
        speed = measure(megabytes=20 if options.quick else 200, rounds=2 if options.quick else 9)
    only = f" --only {options.only}" if options.only else ""
    command = f"python benchmarks/faults.py {options.what}{' --quick' * options.quick}{only} --seed {options.seed}"
    report = {"torch": torch.__version__, "faults": [{"command": command, **vars(row)} for row in rows], "speed": speed}
    failed = any(row.passed < row.trials or row.failures for row in rows)
    kept = RESULTS / f"{options.what.removesuffix('s')}_faults.json"
    path = options.json or (None if options.quick or failed else kept)
    if path and options.only and path.exists():
        new = {row["fault"]: row for row in report["faults"]}
        old = json.loads(path.read_text(encoding="utf-8"))["faults"]
        report["faults"] = [new.pop(row["fault"], row) for row in old] + list(new.values())
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
