"""What ranks do in test_strategies_resume.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.manager import CheckpointManager
from disttrain.config.parallel import ParallelConfig
from disttrain.engines import NativeEngine
from disttrain.parallel.ddp import apply_ddp
from disttrain.train.step import train_step
from tests.parallel.memory_jobs import build_engine, rank_batches

CPU = torch.device("cpu")
SCALE = 2.0**12
"""Not the one that a fresh engine starts with."""


class Seen(NamedTuple):
    """A run after two steps: all its state, whole, and the loss of its third step over all ranks."""

    state: dict[str, Tensor]
    next_loss: float


def save(rank: int, world: int, settings: dict[str, Any], directory: Path) -> Seen:
    """Train two steps, save, and train a third."""
    engine = build_engine(world, ParallelConfig(**settings), "gpt2", torch.float32)
    if engine.loss_scale.enabled:
        engine.loss_scale.scale.fill_(SCALE)
    for step in range(2):
        _step(engine, rank, world, step)
    facts: dict[str, Any] = {"config": {}, "data": {}, "strategy": settings["strategy"]}
    _manager(directory).save(engine.state(), step=2, samples=0, tokens=0, **facts)
    return _seen(engine, rank, world)


def load(rank: int, world: int, settings: dict[str, Any], directories: list[Path]) -> list[Seen]:
    """Load one checkpoint after the other into an engine that has trained on other data, and train a third step."""
    engine = build_engine(world, ParallelConfig(**settings), "gpt2", torch.float32)
    _step(engine, rank, world, 7)
    return [_load(engine, rank, world, directory) for directory in directories]


def _load(engine: NativeEngine, rank: int, world: int, directory: Path) -> Seen:
    checkpoints = _manager(directory)
    found = checkpoints.latest()
    assert found is not None
    checkpoints.load(engine.state(), found)
    engine.loaded()
    return _seen(engine, rank, world)


def _seen(engine: NativeEngine, rank: int, world: int) -> Seen:
    state = {name: _whole(tensor) for name, tensor in engine.state().items()}
    return Seen(state, _step(engine, rank, world, 2))


def _step(engine: NativeEngine, rank: int, world: int, step: int) -> float:
    result = train_step(engine, rank_batches(step, rank, world, 2), lr_factor=1.0, device=CPU)
    dist.all_reduce(result.loss_sum)
    return result.loss_sum.item()


def _manager(directory: Path) -> CheckpointManager:
    return CheckpointManager(LocalStorage(directory), keep_last=1, run_id="run")


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class _Reversed(nn.Module):
    """Its gradients come in another order than its parameters stand in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first = nn.Linear(48, 40), nn.Linear(32, 48)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs)).square().sum()


def first_and_later_gradients(rank: int, world: int) -> list[Tensor]:
    """Of one ddp model and one batch, all in one row each: of its first backward, its second and its third."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_replicate",))
    model = _Reversed()
    replicated = apply_ddp(model, mesh)
    inputs = torch.randn(5, 32, generator=torch.Generator().manual_seed(rank))
    rows = []
    for _ in range(3):
        replicated(inputs).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    return rows
