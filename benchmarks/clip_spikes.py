"""What clipping makes of spikes: `python benchmarks/clip_spikes.py`, a quarter of an hour on two cores.

Trains the model of configs/base.toml for 240 steps under fsdp on two processes. From step 120 on, in every fourth step,
the gradient of one unit (a kind of weights in one layer, another each time) is overlaid with noise of 30 times its
norm, the same for every policy. Writes results/clip_spikes.{json,md} and a chart for each optimizer:

- validation loss at the end, without spikes and with them under each policy;
- of `adaptive`: how many of the spikes it found, in what share of the other steps it clipped a unit (by importance),
  what was left of a spike, and how much log-norms scatter (the simulation behind the thresholds assumed 0.15).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from benchmarks.plot import line_chart
from disttrain.config.load import load_config
from disttrain.data.loader import validation_batches
from disttrain.distributed.env import Ranks
from disttrain.engines import Engine, UpdateResult
from disttrain.optim.clip_statistics import AdaptiveRule
from disttrain.schedule import LrSchedule
from disttrain.testing import RankPool
from disttrain.train.build import Training, build_training
from disttrain.train.evaluate import evaluate
from disttrain.train.preflight import open_config_data
from disttrain.train.step import train_step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
STEPS, EVERY, WORLD = 240, 20, 2
SPIKES = tuple(range(120, STEPS, 4))
SPIKE_SIZE = 30.0
PARTS = ((".attention.wq.", ".attention.wk."), (".attention.wv.", ".attention.wo."), (".mlp.",))
OPTIMIZERS = {"adamw": 2e-3, "muon": 4e-3}
ADAPTIVE = "adaptive, norm of all"
POLICIES: dict[str, list[str]] = {
    "no spikes, norm of all": [],
    "no spikes, nothing": ["optim.clip.kind=none"],
    "norm of all": [],
    ADAPTIVE: ["optim.clip.kind=adaptive"],
    "adaptive alone": ["optim.clip.kind=adaptive", "optim.clip.max_norm=0.0"],
    "zclip": ["optim.clip.kind=zclip"],
    "agc": ["optim.clip.kind=agc"],
    "nothing": ["optim.clip.kind=none"],
}
SHOWN = ("no spikes, norm of all", "norm of all", ADAPTIVE, "agc", "nothing")
COMMON = [
    f"train.steps={STEPS}",
    "train.global_batch_tokens=1024",
    "train.sequence_length=128",
    "device=cpu",
    "resilience.anomaly.spikes=false",  # the spikes are for the clipping alone
]


class Spiked:
    """An engine whose gradients are spoilt in some steps, between the backward and the clipping."""

    def __init__(self, parts: Training, spikes: Sequence[int]) -> None:
        self.engine, self.spikes = parts.engine, spikes
        self.parameters = dict(parts.gpt.named_parameters())
        self.layers = len(parts.gpt.blocks)
        self.step = 0
        self.begin_step = self.engine.begin_step
        self.forward, self.backward = self.engine.forward, self.engine.backward
        self.evaluation_weights, self.state = self.engine.evaluation_weights, self.engine.state
        self.loaded, self.weights_changed = self.engine.loaded, self.engine.weights_changed

    def finish_step(self, lr_factor: float | Sequence[float], loss: Tensor | None = None) -> UpdateResult:
        self.step += 1
        if self.step in self.spikes:
            self._spoil(self.spikes.index(self.step))
        return self.engine.finish_step(lr_factor, loss)

    @torch.no_grad()
    def _spoil(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        layer, parts = number % self.layers, PARTS[number % len(PARTS)]
        for name, parameter in self.parameters.items():
            if name.startswith(f"blocks.{layer}.") and any(part in name for part in parts):
                gradient = parameter.grad
                assert isinstance(gradient, DTensor)
                whole = torch.randn(gradient.shape, generator=generator)
                whole *= SPIKE_SIZE * gradient.full_tensor().norm() / whole.norm()
                gradient.add_(distribute_tensor(whole, gradient.device_mesh, gradient.placements))


# What ranks do.


def train_one(rank: int, world: int, optimizer: str, policy: str) -> dict[str, Any]:
    """Losses of every step, validation losses, and what adaptive clipping saw of each unit in each step."""
    settings = [f"optim.preset={optimizer}", f"optim.lr={OPTIMIZERS[optimizer]}", *COMMON, *POLICIES[policy]]
    config = load_config(ROOT / "configs" / "fsdp.toml", settings, world=world).config
    data = open_config_data(config)
    config = config.with_vocab_size(config.model.vocab_size or data.tokenizer.vocab_size)  # type: ignore[union-attr]
    parts = build_training(config, data, Ranks(rank, world, rank, world), CPU)
    engine: Engine = Spiked(parts, () if policy.startswith("no spikes") else SPIKES)
    rules = [rule for rule in parts.safeguards.clipper.rules if isinstance(rule, AdaptiveRule)]
    losses, validation, units = [], [], []
    schedule = LrSchedule("cosine", warmup_tokens=50, horizon_tokens=STEPS, final_ratio=0.1)
    for step in range(STEPS):
        batches = [(torch.from_numpy(b.tokens), torch.from_numpy(b.labels)) for b in _batches(parts, step)]
        usual = torch.cat([rule.state[:, 0].clone() for rule in rules]) if rules else None
        result = train_step(engine, batches, lr_factor=schedule.factor(step + 1), device=CPU)
        losses.append(_summed(result.loss_sum) / result.valid_tokens)
        if usual is not None and result.update.norms.units is not None:
            seen = result.update.norms.units
            units.append(torch.stack([seen.norms.log() - usual, seen.scales]).tolist())
        if (step + 1) % EVERY == 0:
            rows = validation_batches(data.validation, config.train.sequence_length, 32_768, rank, world, 4)
            with engine.evaluation_weights():
                validation.append((step + 1, evaluate(parts.model, rows, data.bytes_per_token, CPU).loss))
    names = parts.safeguards.clipper.unit_names
    return {
        "loss": losses,
        "validation": validation,
        "units": units,
        "names": names,
        "importance": _importance(rules),
        "scatter": [rule.state[:, 1].sqrt().tolist() for rule in rules],
    }


def _batches(parts: Training, step: int) -> Any:
    samples = 1024 // 128
    return parts.loader.microbatches(step * samples, samples)


def _summed(value: Tensor) -> float:
    total = value.double()
    dist.all_reduce(total)
    return total.item()


def _importance(rules: Sequence[AdaptiveRule]) -> list[float]:
    return [value for rule in rules for value in rule.importance.tolist()]


# What becomes of it.


def thresholds(run: dict[str, Any]) -> dict[str, Any]:
    """How adaptive clipping did after its warm-up of 100 steps."""
    names, importance = run["names"], run["importance"]
    found, left, clips = 0, [], {value: [0, 0] for value in sorted(set(importance))}
    for step, (excess, scales) in enumerate(run["units"], start=1):
        spiked = hit_unit(names, SPIKES.index(step)) if step in SPIKES else -1
        for index, (over, scale) in enumerate(zip(excess, scales, strict=True)):
            if index == spiked:
                found += scale < 1
                left.append(math.exp(over) * scale)
            elif step > 100:
                clips[importance[index]][0] += scale < 1
                clips[importance[index]][1] += 1
    scatter = sorted(value for row in run["scatter"] for value in row)
    return {
        "spikes": len(SPIKES),
        "found": found,
        "left_of_a_spike": statistics.median(left),
        "other_clips": {f"{value:g}": hits / total for value, (hits, total) in clips.items()},
        "scatter_of_log_norms": [scatter[0], statistics.median(scatter), scatter[-1]],
    }


def hit_unit(names: Sequence[str], number: int) -> int:
    kind, layers = ("attention_qk", "attention_vo", "mlp")[number % 3], 4
    return next(index for index, name in enumerate(names) if name.endswith(f".{kind}.{number % layers}"))


def markdown(results: dict[str, Any]) -> str:
    lines = ["# Clipping and spikes", "", f"`{results['command']}`: {results['what']}", ""]
    lines += [f"| validation loss at the end | {' | '.join(results['optimizers'])} |", "|---" * 3 + "|"]
    for policy in POLICIES:
        ends = [f"{rows[policy]['validation'][-1][1]:.3f}" for rows in results["optimizers"].values()]
        lines.append(f"| {policy} | {' | '.join(ends)} |")
    for optimizer, seen in results["thresholds"].items():
        clips = ", ".join(f"{share:.1%} at importance {value}" for value, share in seen["other_clips"].items())
        low, middle, high = seen["scatter_of_log_norms"]
        lines += [
            "",
            f"Adaptive under {optimizer}: {seen['found']} of {seen['spikes']} spikes found; what was left of one is "
            f"{seen['left_of_a_spike']:.2f} times the usual norm; clipped besides: {clips}; log-norms scatter by "
            f"{low:.2f} to {high:.2f}, median {middle:.2f}.",
        ]
    for optimizer in results["optimizers"]:
        lines += ["", f"![{optimizer}](clip_spikes_{optimizer}.svg)"]
    return "\n".join([*lines, ""])


def write_charts(results: dict[str, Any]) -> None:
    """The second half, with the policies that can be told apart."""
    for name, rows in results["optimizers"].items():
        lines = {policy: [p for p in rows[policy]["validation"] if p[0] >= 100] for policy in SHOWN}
        chart = line_chart(f"validation loss, {name}; spikes are marked", "steps", lines, marks=SPIKES)
        (RESULTS / f"clip_spikes_{name}.svg").write_text(chart)


def main() -> int:
    runs: dict[str, dict[str, Any]] = {name: {} for name in OPTIMIZERS}
    with RankPool(max_world=WORLD) as pool:
        for optimizer in OPTIMIZERS:
            for policy in POLICIES:
                job = {"optimizer": optimizer, "policy": policy}
                runs[optimizer][policy] = pool.run("benchmarks.clip_spikes:train_one", WORLD, 600, **job)[0]
                print(f"{optimizer}, {policy}: {runs[optimizer][policy]['validation'][-1][1]:.3f}", flush=True)
    results = {
        "command": "python benchmarks/clip_spikes.py",
        "what": f"{len(SPIKES)} spikes of {SPIKE_SIZE:g} times a unit's norm in {STEPS} steps of 1,024 tokens, "
        f"two processes, one seed",
        "thresholds": {name: thresholds(rows[ADAPTIVE]) for name, rows in runs.items()},
        "optimizers": {
            name: {policy: {"loss": run["loss"], "validation": run["validation"]} for policy, run in rows.items()}
            for name, rows in runs.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "clip_spikes.json").write_text(json.dumps(results) + "\n")
    (RESULTS / "clip_spikes.md").write_text(markdown(results))
    write_charts(results)
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
