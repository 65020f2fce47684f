"""Where the sqrt rule holds: `python benchmarks/batch_law.py`, a quarter of an hour on two cores.

Trains the model of configs/base.toml with AdamW on 262,144 tokens in batches of B = 512, 4B and 16B, each at every
rate of one grid of powers of two (same data order, warm-up and decay in tokens, one seed). From the grid: the best
rate at B, what the larger batches reach with that rate unchanged, with `schedule.batch_lr_rule` sqrt (twice and four
times the rate) and linear (four and sixteen times), and at best. One more run per batch goes through
`schedule.base_batch_tokens` itself and must end where the grid does. Finished runs are reused. Writes
results/batch_law.{json,md,svg}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.plot import line_chart

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs" / "batch_law"
BASE, LENGTH, TOKENS = 512, 128, 2**18
TIMES = (1, 4, 16)
RATES = tuple(2.0**power * 1e-3 for power in range(6))
COMMON = [
    f"train.tokens={TOKENS}",
    f"train.sequence_length={LENGTH}",
    "train.microbatch_size=8",
    f"schedule.warmup_tokens={TOKENS // 16}",
    "monitor.noise_scale_every=1",
    "resilience.anomaly.spikes=false",
    "monitor.evaluate_every=100000",
    "monitor.bigram_baseline=false",
    "monitor.sample_tokens=0",
    "checkpoint.every=100000",
]
RULES = {"unchanged": lambda k: 1.0, "sqrt": lambda k: k**0.5, "linear": float}


def trained(name: str, *overrides: str) -> dict[str, float]:
    """Validation loss and noise scale at the end of a run, made now unless it was before."""
    folder = RUNS / name
    status = folder / "status.json"
    if not status.exists() or json.loads(status.read_text())["state"] != "completed":
        config = RUNS / "fsdp.toml"
        config.parent.mkdir(parents=True, exist_ok=True)
        # A length in tokens takes the place of the base's steps.
        base = (ROOT / "configs" / "base.toml").read_text().replace("steps = 500\n", "", 1)
        config.write_text(base.replace("warmup_steps = 50\n", "") + '[parallel]\nstrategy = "fsdp"\n')
        command = ["-m", "disttrain", "train", str(config), *COMMON, *overrides, f"run.dir={folder}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    loss = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
    print(f"{name}: {loss:.4f}", flush=True)
    scales = [row["noise_scale_tokens"] for row in rows if "noise_scale_tokens" in row]
    return {"validation_loss": loss, "noise_scale_tokens": scales[-1] if scales else float("nan")}


def measured() -> dict[str, Any]:
    grid = {
        k: {
            rate: trained(
                f"batch-{BASE * k}-rate-{rate:g}", f"train.global_batch_tokens={BASE * k}", f"optim.lr={rate}"
            )
            for rate in RATES
        }
        for k in TIMES
    }
    best = min(RATES, key=lambda rate: grid[1][rate]["validation_loss"])
    rows: dict[int, dict[str, Any]] = {}
    for k in TIMES[1:]:
        cells = {name: grid[k].get(best * factor(k)) for name, factor in RULES.items()}
        top = min(RATES, key=lambda rate: grid[k][rate]["validation_loss"])
        rule = [f"schedule.base_batch_tokens={BASE}", "schedule.batch_lr_rule=sqrt", f"optim.lr={best}"]
        by_rule = trained(f"batch-{BASE * k}-by-rule", f"train.global_batch_tokens={BASE * k}", *rule)
        rows[k] = {
            **{name: cell and cell["validation_loss"] for name, cell in cells.items()},
            "best": grid[k][top]["validation_loss"],
            "best_rate": top,
            "by_rule": by_rule["validation_loss"],
        }
    noise = {k: grid[k][best]["noise_scale_tokens"] for k in TIMES}
    return {"grid": grid, "best_rate": best, "rows": rows, "noise_scale_tokens": noise}


def markdown(results: dict[str, Any]) -> str:
    rates = " | ".join(f"{rate:g}" for rate in RATES)
    lines = ["# Where the sqrt rule holds", "", f"`{results['command']}`: {results['what']}", ""]
    lines += [f"| validation loss at the end, by rate | {rates} |", "|---" * (len(RATES) + 1) + "|"]
    for k, cells in results["grid"].items():
        found = " | ".join(f"{cells[rate]['validation_loss']:.3f}" for rate in RATES)
        lines.append(f"| batch of {BASE * k:,} tokens, {TOKENS // (BASE * k)} steps | {found} |")
    best = results["best_rate"]
    at_base = results["grid"][1][best]["validation_loss"]
    lines += ["", f"Best rate at {BASE} tokens: {best:g} ({at_base:.3f}). Larger batches at equal tokens:", ""]
    lines += ["| batch | rate unchanged | sqrt | linear | best of the grid |", "|---" * 5 + "|"]
    for k, row in results["rows"].items():
        shown = [f"{row[name]:.3f}" if row[name] else "not in the grid" for name in RULES]
        lines.append(f"| {BASE * k:,} | {' | '.join(shown)} | {row['best']:.3f} at {row['best_rate']:g} |")
    exact = max(abs(row["by_rule"] - row["sqrt"]) for row in results["rows"].values() if row["sqrt"])
    scales = ", ".join(f"{scale:,.0f} at {BASE * k:,}" for k, scale in results["noise_scale_tokens"].items())
    lines += [
        "",
        f"The rule's own runs end within {exact:.1e} of the grid's. Noise scale at the end, in tokens: {scales}.",
    ]
    return "\n".join([*lines, "", "![loss by rate](batch_law.svg)", ""])


def main() -> int:
    results = {
        "command": "python benchmarks/batch_law.py",
        "what": f"1.8 million weights, {TOKENS:,} tokens, two processes, one seed: differences below 0.03 are noise",
        **measured(),
    }
    lines = {
        f"batch {BASE * k:,}": [(index, cells[rate]["validation_loss"]) for index, rate in enumerate(RATES)]
        for k, cells in results["grid"].items()
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "batch_law.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "batch_law.md").write_text(markdown(results))
    across = "learning rate, in doublings of 0.001"
    (RESULTS / "batch_law.svg").write_text(line_chart("validation loss at equal tokens", across, lines, dots=True))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
