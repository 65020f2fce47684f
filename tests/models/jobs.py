"""What the rank pool runs for the models."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.config import ModelConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig, Strategy
from disttrain.distributed.mesh import build_mesh
from disttrain.models import GPT, generate_tokens
from disttrain.train.build import build_model

LENGTH = 7


def built(world: int, strategy: Strategy, config: ModelConfig) -> tuple[GPT, torch.nn.Module]:
    mesh = build_mesh(ParallelDims.resolve(strategy, None, None, world), "cpu")
    return build_model(
        config,
        max_length=LENGTH,
        mesh=mesh,
        parallel=ParallelConfig(strategy=strategy),
        seed=3,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )


def initial_weights(
    rank: int, world: int, strategy: Strategy, config: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole tensors, and what this rank holds of them."""
    named = dict(built(world, strategy, config)[0].named_parameters())
    whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in named.items()}
    held = {n: (p.to_local() if isinstance(p, DTensor) else p).detach().clone() for n, p in named.items()}
    return whole, held


def tied_head(rank: int, world: int, strategy: Strategy, config: ModelConfig) -> dict[str, Any]:
    """What became of a tied head after building, and after a forward, a backward and a write."""
    gpt, model = built(world, strategy, config)
    seen: dict[str, Any] = {"same_at_first": gpt.head.weight is gpt.wte.weight, "matmul": gpt.matmul_parameters}
    seen["names"] = [name for name, _ in gpt.named_parameters() if name in ("wte.weight", "head.weight")]
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 53
    model(tokens, tokens).backward()
    gradient = gpt.wte.weight.grad
    assert gradient is not None
    seen["gradient"] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    with torch.no_grad():
        gpt.wte.weight.mul_(0.0)
    seen["largest_logit"] = model(tokens).abs().max().item()
    seen["same_at_last"] = gpt.head.weight is gpt.wte.weight
    return seen


def sampled(rank: int, world: int, strategy: Strategy, config: ModelConfig, count: int) -> list[int]:
    _, model = built(world, strategy, config)
    return generate_tokens(model, [[1, 2]], count, max_length=LENGTH, device=torch.device("cpu"), seed=5)[0]
