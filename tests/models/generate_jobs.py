"""What ranks do in test_generate_cache.py."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from disttrain.config import ModelConfig
from disttrain.models import GPT, generate_tokens, init_parameters

CPU = torch.device("cpu")
PROMPTS = [[3], [5, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8]]
VOCAB, MAX_LENGTH, COUNT = 29, 12, 10
SHAPES = [(3, 7), *[(3, 1)] * 5, *[(3, 12)] * 4]
"""Of the tokens of each pass: 7 + 5 tokens fit into 12, then the window moves."""


def build(**settings: object) -> GPT:
    """A GPT in fp64 whose attention looks around: weights of std 0.3."""
    shape = {"n_layers": 3, "d_model": 32, "n_heads": 4, "vocab_size": VOCAB, "init_std": 0.3}
    model = GPT(ModelConfig.model_validate({**shape, **settings}), MAX_LENGTH).double()
    init_parameters(model, seed=3)
    return model.eval()


def generate(model: nn.Module, prompts: list[list[int]], seed: int = 0, temperature: float = 1.0) -> list[list[int]]:
    return generate_tokens(model, prompts, COUNT, max_length=MAX_LENGTH, device=CPU, temperature=temperature, seed=seed)


def generated_by_ranks(rank: int, world: int, strategy: str) -> list[list[int]]:
    model: nn.Module = build(position="rope")
    if strategy == "ddp":
        return generate(DistributedDataParallel(model), PROMPTS)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return generate(fully_shard(model, mesh=mesh), PROMPTS)
