"""What ranks do in test_ownership.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from disttrain.config import OptimConfig
from disttrain.config.parallel import ParallelConfig
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.optim.movement import MovementCheck
from disttrain.optim.ownership import Ownership, ownership
from disttrain.optim.sharding import local
from disttrain.testing.optimizer_parity import Toys

CPU = torch.device("cpu")


def rows(rank: int, world: int, settings: dict[str, Any]) -> list[Ownership]:
    toys = Toys(world, CPU, ParallelConfig(**settings))
    return ownership(build_optimizer(toys, OptimConfig(), GPT_PLAN))


def unmoved(rank: int, world: int) -> list[str]:
    """One row of `one_row` lies on one rank only; `wide` and `vector` stay."""
    toys = Toys(world, CPU, ParallelConfig(strategy="fsdp"))
    check = MovementCheck(dict(toys.named_parameters()))
    with torch.no_grad():
        for name, parameter in toys.named_parameters():
            if name not in ("wide", "vector") and local(parameter).numel():
                local(parameter).view(-1)[-1] += 1e-15
    return check.dist_unmoved()


def cancelling(rank: int, world: int) -> list[str]:
    """Elements that change places with their negatives keep the norm, those that add up to nothing keep the sum."""
    parameters = {name: nn.Parameter(torch.tensor([1.0, 2.0])) for name in ("sign", "sum", "still")}
    check = MovementCheck(parameters)
    with torch.no_grad():
        parameters["sign"].neg_()
        parameters["sum"].add_(torch.tensor([0.5, -0.5]))
    return check.dist_unmoved()
