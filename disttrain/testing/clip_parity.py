"""Clipping, the limit on updates and QK-Clip on every layout against one process, under AdamW and Muon; in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from disttrain.config import OptimConfig
from disttrain.engines import NativeEngine
from disttrain.testing.optimizer_parity import STRATEGIES, TRAINING_TOLERANCE, training_error
from disttrain.testing.parity import ParityRow, place
from disttrain.testing.pool import RankPool

WORLDS = (2, 4)
MODEL = "gpt2"
"""With biases, five query heads on one key head, and no QK-norm."""
_UNITS = [
    {"name": "qk", "match": [r"attention\.w[qk]\."], "importance": 1.5},
    {"name": "vectors", "match": ["norm", r"(up|down|wv|wo)\.bias"]},
]
_ADAPTIVE = {"kind": "adaptive", "warmup_steps": 2, "early": 0.3, "late": 0.05, "decay": 0.7, "tighten_from": 1}
_EXACT = {"mode": "clip", "logits": "exact", "threshold": 1e-3}

POLICIES: dict[str, dict[str, Any]] = {
    "adaptive": {"clip": _ADAPTIVE, "clip_norm": 0.0},
    "adaptive, units of one's own": {
        "clip": {**_ADAPTIVE, "units": _UNITS, "edge_importance": 1.25, "winsor": 0.5, "limit": 0.2, "max_norm": 0.25}
    },
    "agc": {"clip": {"kind": "agc", "limit": 0.02}},
    "zclip": {"clip": {"kind": "zclip", "warmup_steps": 2, "z": 0.2, "decay": 0.1, "max_norm": 0.6}},
    "zclip of groups": {
        "clip": {"kind": "zclip", "warmup_steps": 2, "z": 0.1, "decay": 0.1, "over": "group", "max_norm": 0.0}
    },
    "update limit": {"max_update_ratio": 0.02},
    "qk-clip": {"qk_clip": {"mode": "clip", "threshold": 1.9}},
    "qk-clip, exact": {"qk_clip": _EXACT},
    "qk-clip, exact, shared k": {"qk_clip": {**_EXACT, "grouped": "shared_k", "alpha": 0.3}},
    "all": {"clip": _ADAPTIVE, "clip_norm": 0.2, "max_update_ratio": 0.05, "qk_clip": _EXACT},
}
OPTIMIZERS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{"name": "all", "match": [".*"], "algorithm": "adamw", "lr": 1e-2, "eps": 1e-6}],
    "muon": [
        {"name": "hidden", "match": ["role:matrices"], "algorithm": "muon", "lr": 0.02, "compute_dtype": "parameter"},
        {"name": "rest", "match": [".*"], "algorithm": "adamw", "lr": 1e-2, "eps": 1e-6},
    ],
}

Spoil = Callable[[NativeEngine], None]


def clip_optim(policy: str, optimizer: str) -> OptimConfig:
    return OptimConfig.model_validate({"groups": OPTIMIZERS[optimizer], **POLICIES[policy]})


def clip_table(pool: RankPool, worlds: tuple[int, ...] = WORLDS) -> Iterator[ParityRow]:
    """A row for each policy under each optimizer, on every strategy."""
    for world in worlds:
        for strategy, settings in STRATEGIES.items():
            job = "disttrain.testing.clip_parity:clip_job"
            errors = pool.run(job, world, 240, device=pool.device, settings=settings)[0]
            for name, error in errors.items():
                yield ParityRow(strategy, world, f"{name}, training", "parameters", error, TRAINING_TOLERANCE)


def clip_job(
    rank: int, world: int, device: str, settings: dict[str, Any], spoil: Spoil = lambda engine: None
) -> dict[str, float]:
    """The largest error of a GPT's weights after training with two microbatches, for every policy and optimizer."""
    return {
        f"{policy} ({optimizer})": training_error(
            rank,
            world,
            place(device, rank),
            settings,
            clip_optim(policy, optimizer),
            model=MODEL,
            accumulation=2,
            spoil=spoil,
        )
        for policy in POLICIES
        for optimizer in OPTIMIZERS
    }
