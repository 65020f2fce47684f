"""What ranks do in test_state_precision.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from disttrain.config import OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.models import GPT_PLAN, ShardingPlan
from disttrain.optim import OptimizerSet, build_optimizer
from disttrain.parallel.fsdp import apply_fsdp

SHAPES = {"large": (70, 300), "one_row": (1, 4200), "small": (3, 5), "vector": (11,)}


class Toys(nn.Module):
    """fp32; the first two are large enough for eight bits, the second has fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def optimizer_of(toys: nn.Module, algorithm: str, dtype: str) -> OptimizerSet:
    optim = {"preset": algorithm, "lr": 1e-2, "state_dtype": dtype}
    return build_optimizer(toys, OptimConfig.model_validate(optim), GPT_PLAN, seed=9)


def train(toys: nn.Module, optimizer: OptimizerSet, steps: int) -> dict[str, Tensor]:
    """Whole weights and states after `steps` with the same gradients on every layout."""
    for step in range(steps):
        for name, parameter in toys.named_parameters():
            gradient = gradients(step)[name]
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    seen = dict(toys.named_parameters())
    held = {name: {f"{name}.{k}": v for k, v in optimizer.state[p].items()} for name, p in seen.items()}
    everything = dict(seen) | {key: value for states in held.values() for key, value in states.items()}
    return {key: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for key, t in everything.items()}


def sharded(rank: int, world: int, settings: dict[str, Any], algorithm: str, dtype: str) -> dict[str, Tensor]:
    parallel = ParallelConfig(**settings)
    toys = Toys()
    if parallel.strategy != "ddp":
        dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
        apply_fsdp(toys, build_mesh(dims, "cpu"), ShardingPlan((), {}, ()), parallel)
    return train(toys, optimizer_of(toys, algorithm, dtype), 4)
