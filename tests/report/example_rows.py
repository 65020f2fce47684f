"""The log rows of a synthetic run, with every column that a report knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

GROUPS = ("matrices", "embeddings", "no_decay")
LAYERS = 12
RANKS = 8
START_UNIX_SECONDS = 1_750_000_000.0
EDGES = [round(0.3 * 1.025**n, 5) for n in range(61)]

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """`rows` log rows, `log_every` steps apart. `final_loss` and `seed` make runs that differ."""

    name: str = "gpt-124m-muon"
    rows: int = 400
    log_every: int = 10
    seed: int = 0
    final_loss: float = 3.1
    lr: float = 0.02
    units: int = 24
    columns: str = "all"
    """`all`, or `old`: what runs logged before there were clocks, memory and the parts of a step."""

    @property
    def steps(self) -> int:
        return self.rows * self.log_every


def smooth_loss(example: Example, step: int) -> float:
    done = step / example.steps
    return example.final_loss + 7.6 * math.exp(-14 * done) + 0.5 * (1 - done)


def seconds_at(example: Example, step: int) -> float:
    """After the start; the run stood still for eight minutes after it had failed at its middle."""
    return START_UNIX_SECONDS + 0.52 * step + 40 + (480 if step > example.steps * 0.45 else 0)


def log_row(example: Example, step: int, index: int, random: np.random.Generator) -> Row:
    done = step / example.steps
    batch = 262_144 if done < 0.3 else 524_288
    loss = smooth_loss(example, step) + random.normal(0, 0.035)
    spike = index > 4 and index % 59 == 0
    slow = 0.65 < done < 0.75
    step_seconds = 0.50 + 0.03 * random.random() + (0.35 if spike else 0)
    row: Row = {
        "step": step,
        "tokens": int(step * 262_144 + max(0.0, done - 0.3) * example.steps * 262_144),
        "unix_seconds": seconds_at(example, step),
        "loss": "nan" if index == 211 else loss + (0.9 if spike else 0),
        "grad_norm": 0.0,
        "valid_tokens": batch,
        "global_batch_tokens": batch,
        "tokens_per_second": batch / step_seconds,
        "model_flops_per_second": batch / step_seconds * 0.86e9,
        "mfu": batch / step_seconds * 0.86e9 / 1.98e15,
        "step_seconds": step_seconds,
        "seconds_left": (example.steps - step) * 0.52,
        "skipped_steps": float(index % 150 == 149),
        "max_attention_logit": 0.0,
    }
    row |= step_part_columns(step_seconds, spike, random) | resource_columns(done, random)
    row |= noise_columns(done, random) | group_columns(example, done, spike, random)
    row |= unit_columns(example, done, spike, random) | attention_columns(done, random)
    row |= {
        f"rank/{rank}/own_step_seconds": step_seconds
        * (1 + 0.02 * random.random())
        * (1.3 if rank == 3 and slow else 1)
        for rank in range(RANKS)
    }
    row["grad_norm"] = math.sqrt(sum(row[f"grad_norm/{group}"] ** 2 for group in GROUPS))
    times = random.normal(step_seconds, 0.02, example.log_every * RANKS)
    counts, _ = np.histogram(times, EDGES)
    row["step_seconds_histogram"] = {"edges": EDGES, "counts": counts.tolist()}
    return row


def step_part_columns(step_seconds: float, spike: bool, random: np.random.Generator) -> Row:
    parts = {"data": 0.01, "forward": 0.27, "backward": 0.5, "optimizer": 0.08, "communication": 0.07}
    found = {f"{name}_seconds": share * (0.47 + 0.03 * random.random()) for name, share in parts.items()}
    found["checkpoint_seconds"] = 0.3 if spike else 0.0
    found["evaluation_seconds"] = 0.02
    return found


def resource_columns(done: float, random: np.random.Generator) -> Row:
    return {
        "goodput": 0.97 - 0.12 * (done > 0.45) * (1 - done) - 0.01 * random.random(),
        "peak_allocated_bytes": 41.2e9 + 6e9 * (done > 0.3),
        "peak_reserved_bytes": 46.8e9 + 7e9 * (done > 0.3),
        "host_rss_bytes": 5.1e9 + 4e8 * done,
        "loss_scale": 2.0 ** (12 + int(done * 4)),
    }


def noise_columns(done: float, random: np.random.Generator) -> Row:
    noise = 60_000 * math.exp(3.2 * done) * math.exp(random.normal(0, 0.25))
    return {"noise_scale_tokens": noise, "suggested_batch_tokens": round(noise / 65_536 + 1) * 65_536}


def group_columns(example: Example, done: float, spike: bool, random: np.random.Generator) -> Row:
    rate = example.lr * min(1.0, done / 0.05) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    row: Row = {"lr": rate, "clip_threshold": 1.0}
    for position, group in enumerate(GROUPS):
        usual = (0.7, 0.3, 0.12)[position] * (1 + 4 * math.exp(-30 * done))
        norm = usual * math.exp(random.normal(0, 0.12)) * (6 if spike and position < 2 else 1)
        threshold = usual * (2.6 - 1.2 * done)
        rms = 0.02 * (1 + done) / (1 + position)
        row |= {
            f"lr/{group}": rate if position == 0 else rate / 10,
            f"grad_norm/{group}": norm,
            f"clip_threshold/{group}": threshold,
            f"clip_scale/{group}": min(1.0, threshold / norm),
            f"clip_share/{group}": 0.1 * (norm > threshold) + 0.1 * (spike and position < 2),
            f"param_rms/{group}": rms,
            f"update_rms/{group}": rms * rate * (0.2 + 0.02 * random.random()),
            f"update_ratio/{group}": rate * (0.2 + 0.02 * random.random()),
        }
    return row


def unit_columns(example: Example, done: float, spike: bool, random: np.random.Generator) -> Row:
    row: Row = {}
    for unit in range(example.units):
        norm = 0.1 * (1 + unit / 12) * math.exp(random.normal(0, 0.2)) * (5 if spike and unit % 5 == 0 else 1)
        row[f"unit_norm/blocks.{unit}"] = norm
        if done > 0.02:
            threshold = 0.18 * (1 + unit / 12) * (1.3 - 0.4 * done)
            row[f"unit_threshold/blocks.{unit}"] = threshold
            row[f"unit_scale/blocks.{unit}"] = min(1.0, threshold / norm)
            row[f"unit_clip_share/blocks.{unit}"] = 0.1 * (norm > threshold)
    return row


def attention_columns(done: float, random: np.random.Generator) -> Row:
    def logit(layer: int) -> float:
        return (12 + 9 * layer) * (0.3 + min(1.0, 2 * done)) * (1 + 0.05 * random.normal())

    logits = {f"max_attention_logit/{layer}": min(103.0, logit(layer)) for layer in range(LAYERS)}
    largest = max(logits.values())
    scale = min(1.0, 100 / largest)
    return {"max_attention_logit": largest, "qk_clip_heads": 3.0 * (scale < 1), "qk_clip_scale": scale} | logits
