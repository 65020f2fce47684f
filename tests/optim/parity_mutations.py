"""Mistakes that the table of optimizers must show, made on purpose."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

import disttrain.optim.adafactor as adafactor
from disttrain.optim import OptimizerSet
from disttrain.testing.optimizer_parity import synthetic_job


def spoilt(rank: int, world: int, mistake: str, settings: dict[str, Any]) -> dict[str, float]:
    """The errors of all algorithms with `mistake`."""
    if mistake != "sums that stay local":
        spoil = {"a wrong hyperparameter": _other_rate, "a skipped shard": _skip_on_last_rank}[mistake]
        return synthetic_job(rank, world, "cpu", settings, spoil)
    sums = adafactor._dist_sums
    adafactor._dist_sums = lambda parts: [part for part, _ in parts]
    try:
        return synthetic_job(rank, world, "cpu", settings)
    finally:
        adafactor._dist_sums = sums


def _other_rate(optimizer: OptimizerSet) -> None:
    for group in optimizer.param_groups:
        group["initial_lr"] *= 1 + 1e-9


def _skip_on_last_rank(optimizer: OptimizerSet) -> None:
    """The last rank's rate is zero: its rows stay where they were."""
    if dist.get_rank() == dist.get_world_size() - 1:
        for group in optimizer.param_groups:
            group["initial_lr"] = 0.0
