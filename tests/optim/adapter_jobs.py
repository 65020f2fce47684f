"""What ranks do in test_adapter.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from disttrain.config import OptimConfig
from disttrain.testing.optimizer_parity import LR_FACTORS
from tests.optim.resume_jobs import Run, whole


def train(rank: int, world: int, settings: dict[str, Any], optims: dict[str, OptimConfig]) -> dict[str, Any]:
    """The whole weights after every step of every optimizer."""
    seen: dict[str, dict[str, Tensor]] = {}
    for name, optim in optims.items():
        run = Run(world, settings, optim)
        run.train(range(len(LR_FACTORS)))
        seen[name] = whole(run.toys)
    return seen
