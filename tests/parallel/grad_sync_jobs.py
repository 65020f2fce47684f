"""What ranks do in test_grad_sync.py."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.config import ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import NativeEngine, UpdateResult
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.optim.sharding import local
from disttrain.parallel import set_gradient_sync
from disttrain.testing.collectives import CollectiveCounter, sharded_traffic
from disttrain.testing.parity import LENGTH, MODELS, OPTIM
from disttrain.train.build import build_model
from disttrain.train.step import train_step

CPU = torch.device("cpu")


def engine_of(world: int, settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> Keeping:
    parallel = ParallelConfig(**settings)
    dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
    gpt, model = build_model(
        MODELS["gpt2"],
        max_length=LENGTH,
        mesh=build_mesh(dims, "cpu"),
        parallel=parallel,
        seed=0,
        device=CPU,
        dtype=dtype,
    )
    optimizer = build_optimizer(gpt, OPTIM, GPT_PLAN)
    return Keeping(gpt, model, optimizer, parallel=parallel, device=CPU)


class Keeping(NativeEngine):
    """Keeps the whole gradients of its last step, for which it gathers them."""

    keeps = True

    def finish_step(self, lr_factor: float | Sequence[float], loss: Tensor | None = None) -> UpdateResult:
        if self.keeps:
            self.kept = whole_gradients(self.module)
        return super().finish_step(lr_factor, loss)


def whole_gradients(gpt: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in grads.items()}


def rank_loss(model: nn.Module, rank: int, rows: int = 2) -> Tensor:
    """A loss whose gradient differs between ranks."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(53, (rows, LENGTH), generator=generator)
    return model(tokens, tokens.roll(-1, 1)) * (rank + 1)


def sums_of_gradients(rank: int, world: int, settings: dict[str, Any]) -> float:
    """Largest difference between the synchronised gradient and the sum of all ranks' own gradients."""
    engine = engine_of(world, settings)
    rank_loss(engine.model, rank).backward()
    synced = whole_gradients(engine.module)
    alone = engine_of(world, {"strategy": "ddp"}).module  # not called through DDP: nothing is synchronised
    for other in range(world):
        rank_loss(alone, other).backward()
    return max((synced[name] - p.grad).abs().max().item() for name, p in alone.named_parameters() if p.grad is not None)


def unsynced_until_last(rank: int, world: int, settings: dict[str, Any]) -> list[dict[str, int]]:
    """Collectives of each of three microbatches' forward and backward."""
    engine = engine_of(world, settings)
    counted = []
    for index in range(3):
        with CollectiveCounter() as counter:
            set_gradient_sync(engine.model, index == 2, engine.rules)
            rank_loss(engine.model, rank).backward()
        counted.append(sharded_traffic(counter, shards_of(engine))[0])
    return counted


def step_traffic(rank: int, world: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Collectives and bytes of one whole training step with three microbatches, and what a formula needs."""
    engine = engine_of(world, settings)
    engine.keeps = False
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    for _ in range(2):  # DDP orders its buckets by what it saw in the first step, and agrees on them in the second
        train_step(engine, [(tokens, tokens)] * 3, lr_factor=1.0, device=CPU)
    with CollectiveCounter() as counter:
        train_step(engine, [(tokens, tokens)] * 3, lr_factor=1.0, device=CPU)
    shapes = [tuple(p.shape) for p in engine.module.parameters()]
    root = [tuple(p.shape) for name, p in engine.module.named_parameters() if not name.startswith("blocks.")]
    calls, moved = sharded_traffic(counter, shards_of(engine))
    return {"calls": calls, "bytes": moved, "shapes": shapes, "root_shapes": root}


def shards_of(engine: NativeEngine) -> int:
    parameter = next(engine.module.parameters())
    return parameter.device_mesh.size(-1) if isinstance(parameter, DTensor) else 1


def gradients_that_stay(rank: int, world: int) -> int:
    """How many of a step's sharded gradients somebody still holds after it."""
    engine = engine_of(world, {"strategy": "fsdp"})
    engine.keeps = False
    rank_loss(engine.model, rank).backward()
    gradients = [weakref.ref(local(p.grad)) for p in engine.module.parameters() if p.grad is not None]
    assert gradients
    engine.finish_step(1.0)
    return sum(gradient() is not None for gradient in gradients)


def moved_gradients(rank: int, world: int) -> int:
    """How many of DDP's gradients lie outside its buckets after a microbatch that is not a step's last."""
    engine = engine_of(world, {"strategy": "ddp"})
    engine.keeps = False
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    for _ in range(2):
        train_step(engine, [(tokens, tokens)] * 2, lr_factor=1.0, device=CPU)
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    in_buckets = [gradient.data_ptr() for gradient in gradients]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
    set_gradient_sync(engine.model, False, engine.rules)
    rank_loss(engine.model, rank).backward()
    now = [p.grad.data_ptr() for p in engine.module.parameters() if p.grad is not None]
    return sum(before != after for before, after in zip(in_buckets, now, strict=True))


def gradients_by_share(rank: int, world: int, settings: dict[str, Any], shares: list[list[int]]) -> dict[str, Any]:
    """Gradients of one step in which rank r has shares[r] valid labels in each of its microbatches (0: none)."""
    engine = engine_of(world, settings)
    everything = [[_microbatch(r, i, valid) for i, valid in enumerate(row)] for r, row in enumerate(shares)]
    result = train_step(engine, everything[rank], lr_factor=1.0, device=CPU)
    tokens, labels = (torch.cat(parts) for parts in zip(*(mb for row in everything for mb in row), strict=True))
    alone = engine_of(world, {"strategy": "ddp"}).module
    F.cross_entropy(alone(tokens).flatten(0, 1), labels.flatten()).backward()
    pairs = [(engine.kept[name], p.grad) for name, p in alone.named_parameters()]
    return {
        "error": max((a - b).abs().max().item() for a, b in pairs),
        "largest": max(b.abs().max().item() for _, b in pairs),
        "valid_tokens": result.valid_tokens,
    }


def _microbatch(rank: int, index: int, valid: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + index)
    tokens = torch.randint(53, (2, LENGTH), generator=generator)
    labels = torch.randint(53, (2, LENGTH), generator=generator)
    labels.view(-1)[valid:] = -100
    return tokens, labels


def no_tokens_at_all(rank: int, world: int) -> float:
    """The largest gradient of a step whose labels are all masked, which must still be a finite zero."""
    engine = engine_of(world, {"strategy": "fsdp"})
    result = train_step(engine, [_microbatch(rank, 0, 0)], lr_factor=1.0, device=CPU)
    assert result.valid_tokens == 0
    return max(gradient.abs().max().item() for gradient in engine.kept.values())
