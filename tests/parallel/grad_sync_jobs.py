"""What ranks do in test_grad_sync.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config import ParallelDims
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import NativeEngine
from disttrain.optim import build_optimizer
from disttrain.models import GPT_PLAN
from disttrain.parallel import set_gradient_sync
from disttrain.testing.collectives import CollectiveCounter
from disttrain.testing.parity import LENGTH, MODELS, OPTIM
from disttrain.train.build import build_model
from disttrain.train.step import train_step

CPU = torch.device("cpu")


def model_of(strategy: str, world: int, model: str = "gpt2") -> tuple[nn.Module, nn.Module]:
    mesh = build_mesh(ParallelDims.resolve(strategy, None, None, world), "cpu")
    return build_model(
        MODELS[model], max_length=LENGTH, mesh=mesh, strategy=strategy, seed=0, device=CPU, dtype=torch.float64
    )


def whole_gradients(gpt: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in grads.items()}


def rank_loss(model: nn.Module, rank: int, rows: int = 2) -> Tensor:
    """A loss whose gradient differs between ranks."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(53, (rows, LENGTH), generator=generator)
    return model(tokens, tokens.roll(-1, 1)) * (rank + 1)


def sums_of_gradients(rank: int, world: int, strategy: str) -> float:
    """Largest difference between the synchronised gradient and the sum of all ranks' own gradients."""
    gpt, model = model_of(strategy, world)
    rank_loss(model, rank).backward()
    synced = whole_gradients(gpt)
    alone, _ = model_of("ddp", world)  # not called through DDP: nothing is synchronised
    for other in range(world):
        rank_loss(alone, other).backward()
    return max((synced[name] - p.grad).abs().max().item() for name, p in alone.named_parameters())


def unsynced_until_last(rank: int, world: int, strategy: str, grad_accumulation: str) -> list[dict[str, int]]:
    """Collectives of each of three microbatches' forward and backward."""
    _, model = model_of(strategy, world)
    counted = []
    for index in range(3):
        with CollectiveCounter() as counter:
            set_gradient_sync(model, index == 2, grad_accumulation)
            rank_loss(model, rank).backward()
        counted.append(dict(counter.calls))
    return counted


def step_traffic(rank: int, world: int, strategy: str, grad_accumulation: str) -> dict[str, Any]:
    """Collectives and bytes of one whole training step with three microbatches, and what a formula needs."""
    gpt, model = model_of(strategy, world)
    engine = NativeEngine(
        model, build_optimizer(gpt, OPTIM, GPT_PLAN), clip_norm=1.0, grad_accumulation=grad_accumulation
    )
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    for _ in range(2):  # DDP orders its buckets by what it saw in the first step, and agrees on them in the second
        train_step(engine, [(tokens, tokens)] * 3, lr_factor=1.0, device=CPU)
    with CollectiveCounter() as counter:
        train_step(engine, [(tokens, tokens)] * 3, lr_factor=1.0, device=CPU)
    return {
        "calls": dict(counter.calls),
        "bytes": dict(counter.bytes),
        "shapes": [tuple(p.shape) for p in gpt.parameters()],
    }


def gradients_by_share(rank: int, world: int, strategy: str, shares: list[list[int]]) -> dict[str, Any]:
    """Gradients of one step in which rank r has shares[r] valid labels in each of its microbatches; 0 is none at all."""
    gpt, model = model_of(strategy, world)
    engine = _Keeping(model, build_optimizer(gpt, OPTIM, GPT_PLAN), clip_norm=0.0, grad_accumulation="sharded")
    everything = [[_microbatch(r, i, valid) for i, valid in enumerate(row)] for r, row in enumerate(shares)]
    result = train_step(engine, everything[rank], lr_factor=1.0, device=CPU)
    tokens, labels = (torch.cat(parts) for parts in zip(*(mb for row in everything for mb in row), strict=True))
    alone, _ = model_of("ddp", world)
    F.cross_entropy(alone(tokens).flatten(0, 1), labels.flatten()).backward()
    pairs = [(engine.kept[name], p.grad) for name, p in alone.named_parameters()]
    return {
        "error": max((a - b).abs().max().item() for a, b in pairs),
        "largest": max(b.abs().max().item() for _, b in pairs),
        "valid_tokens": result.valid_tokens,
    }


class _Keeping(NativeEngine):
    def finish_step(self, lr_factor: float) -> Tensor:
        inner = getattr(self.model, "module", self.model)
        self.kept = whole_gradients(inner)
        return super().finish_step(lr_factor)


def _microbatch(rank: int, index: int, valid: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + index)
    tokens = torch.randint(53, (2, LENGTH), generator=generator)
    labels = torch.randint(53, (2, LENGTH), generator=generator)
    labels.view(-1)[valid:] = -100
    return tokens, labels


def no_tokens_at_all(rank: int, world: int) -> float:
    """The largest gradient of a step whose labels are all masked, which must still be a finite zero."""
    gpt, model = model_of("fsdp", world)
    engine = _Keeping(model, build_optimizer(gpt, OPTIM, GPT_PLAN), clip_norm=1.0, grad_accumulation="sharded")
    result = train_step(engine, [_microbatch(rank, 0, 0)], lr_factor=1.0, device=CPU)
    assert result.valid_tokens == 0
    return max(gradient.abs().max().item() for gradient in engine.kept.values())
