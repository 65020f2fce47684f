"""A small model with every awkward shape, and the helpers that train, wrap and read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.manager import CheckpointManager


class Toy(nn.Module):
    """Seven rows divide by no world, three rows are fewer than four ranks, the head is tied, one buffer persists."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 3)
        self.down = nn.Linear(3, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(2))
        self.register_buffer("scratch", torch.rand(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embedding(tokens)).tanh()) * self.scale[0])


def build(strategy: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A toy under "plain", "ddp", "fsdp" or "hsdp", one optimizer step old, so that its optimizer state exists."""
    torch.manual_seed(seed)
    model: nn.Module = Toy()
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    elif strategy in ("fsdp", "hsdp"):
        world = dist.get_world_size()
        shape, names = ((world,), ("shard",)) if strategy == "fsdp" else ((2, world // 2), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for unit in (model.up, model.down, model):
            fully_shard(unit, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same dictionary with whole, detached copies."""
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
    return {k: v.detach().clone() for k, v in whole.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, same dtypes, same bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


FACTS = {"config": {"model": {"width": 6, "eps": 1e-8}}, "data": {"corpus": "toy"}, "strategy": "test"}


def about(step: int) -> dict[str, Any]:
    """What a save says about itself, made up: 8 samples and 64 tokens a step."""
    return {"step": step, "samples": 8 * step, "tokens": 64 * step, **FACTS}


def manager(directory: Path, keep_last: int = 10, run_id: str = "run-a", **settings: Any) -> CheckpointManager:
    return CheckpointManager(LocalStorage(directory), keep_last, run_id, **settings)


def save(directory: Path, state: dict[str, Tensor], step: int, keep_last: int = 10, run_id: str = "run-a") -> Path:
    return Path(manager(directory, keep_last, run_id).save(state, **about(step)))


@contextmanager
def no_pickle() -> Iterator[None]:
    """Make every way to pickle a file fail; torch's object collectives pickle in memory and still work."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a file was pickled or unpickled")

    names = ("pickle.load", "pickle.dump", "torch.load", "torch.save")
    with patch(names[0], refuse), patch(names[1], refuse), patch(names[2], refuse), patch(names[3], refuse):
        yield
