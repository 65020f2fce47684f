"""Attention logits that explode, without and with QK-Clip: `python benchmarks/logit_explosion.py`.

Minutes on two cores. Trains `benchmarks/logit_explosion.toml` (queries and keys at a rate far too high, nothing
clipped) on two processes, once with `optim.qk_clip.mode=log` and once with `clip`; all else is equal. Writes
results/logit_explosion.{json,md} and two charts. It shows a mechanism at work, no recipe: at a sound rate neither run
would need it.
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
RUNS = ROOT / "runs" / "logit_explosion"
CONFIG = "benchmarks/logit_explosion.toml"
CASES = {"without QK-Clip": "log", "with QK-Clip at 100": "clip"}


def trained(mode: str) -> dict[str, Any]:
    """The run's rows of metrics.jsonl and, where it broke off, its last words; trained now unless it was before."""
    folder = RUNS / mode
    status, said = folder / "status.json", folder / "error.txt"
    if not status.exists() or json.loads(status.read_text())["state"] == "running":
        command = ["-m", "disttrain", "train", CONFIG, f"optim.qk_clip.mode={mode}", f"run.dir={folder}"]
        ended = subprocess.run([sys.executable, *command], cwd=ROOT, check=False, capture_output=True, text=True)
        said.write_text(ended.stderr if ended.returncode else "")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return summary(rows) | {"broke_off": said.read_text().strip()}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    logged = [row for row in rows if "loss" in row]
    return {
        "loss": [(row["step"], row["loss"]) for row in logged],
        "largest_logit": [(row["step"], row["max_attention_logit"]) for row in logged],
        "clipped_heads": [(row["step"], row["qk_clip_heads"]) for row in logged],
        "validation_loss": [row["validation_loss"] for row in rows if "validation_loss" in row],
    }


def markdown(results: dict[str, Any]) -> str:
    columns = "| | lowest loss (at step) | validation loss at the end | largest logit | heads clipped a step, of 16 |"
    lines = ["# Attention logits that explode", "", f"`{results['command']}`: {results['what']}", "", columns]
    lines.append("|---" * 5 + "|")
    for name, row in results["runs"].items():
        step, lowest = min(row["loss"], key=lambda point: point[1])
        largest = max(value for _, value in row["largest_logit"])
        heads = sum(value for _, value in row["clipped_heads"]) / len(row["clipped_heads"])
        end = f"{row['validation_loss'][-1]:.2f}" if row["validation_loss"] else "none: it broke off"
        lines.append(f"| {name} | {lowest:.2f} ({step}) | {end} | {largest:.3g} | {heads:.1f} |")
    for name, row in results["runs"].items():
        if row["broke_off"]:
            lines += ["", f"{name}: {row['broke_off'].split(';')[0]}."]
    return "\n".join([*lines, "", "![loss](logit_explosion_loss.svg)", "", "![logits](logit_explosion_logits.svg)", ""])


def main() -> int:
    runs = {name: trained(mode) for name, mode in CASES.items()}
    results = {
        "command": "python benchmarks/logit_explosion.py",
        "what": f"{CONFIG}, 300 steps on two processes; the logit is the bound from the log-sum-exp",
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "logit_explosion.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "logit_explosion.md").write_text(markdown(results))
    for what, title in (("loss", "training loss of a step"), ("logits", "largest attention logit of a step")):
        key = {"loss": "loss", "logits": "largest_logit"}[what]
        chart = line_chart(title, "steps", {name: row[key] for name, row in runs.items()}, log=what == "logits")
        (RESULTS / f"logit_explosion_{what}.svg").write_text(chart)
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
