"""What ranks do in test_noise_scale.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from disttrain.config import OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.data.loader import IGNORE_LABEL
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN, init_parameters
from disttrain.optim import build_optimizer
from disttrain.parallel import NoiseProbe
from disttrain.testing.parity import LENGTH, MODELS, global_batch, parity_model
from disttrain.train.build import build_gpt
from disttrain.train.step import train_step

CPU = torch.device("cpu")
ACCUMULATION = 3


def probed_engine(world: int, settings: dict[str, Any]) -> tuple[NativeEngine, NoiseProbe]:
    parallel = ParallelConfig(**settings)
    dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
    probe = NoiseProbe(parallel, dims)
    gpt, called = parity_model(MODELS["modern"], world, CPU, parallel, probe)
    optimizer = build_optimizer(gpt, OptimConfig(clip_norm=0.1), GPT_PLAN)
    return NativeEngine(gpt, called, optimizer, parallel=parallel, device=CPU, probe=probe), probe


def unmeasured(rank: int, world: int, settings: dict[str, Any]) -> bool:
    """Whether a step that was to measure has not."""
    engine, _ = probed_engine(world, settings)
    tokens, labels = (part.chunk(world)[rank] for part in global_batch(0))
    result = train_step(engine, [(tokens, labels)], lr_factor=0.0, device=CPU, measure_noise=True)
    return result.update.chunks is None and result.chunk_squares == 0


def measured(rank: int, world: int, settings: dict[str, Any]) -> tuple[float, float, list[float], list[int]]:
    """What a step measures, |g|^2, |g_c|^2 of this rank's chunks as a plain GPT has them, and their tokens."""
    engine, probe = probed_engine(world, settings)
    tokens, labels = global_batch(0)
    batches = list(zip(tokens.chunk(world)[rank].chunk(ACCUMULATION), labels.chunk(world)[rank].chunk(ACCUMULATION)))  # noqa: B905
    plain = [_plain_squares([b], labels) for b in batches] if probe.each else [_plain_squares(batches, labels)]
    sizes = [int((label != IGNORE_LABEL).sum()) for _, label in batches]
    unmeasured = train_step(engine, batches, lr_factor=0.0, device=CPU)
    assert unmeasured.update.chunks is None
    result = train_step(engine, batches, lr_factor=0.0, device=CPU, measure_noise=True)
    assert result.update.chunks is not None
    assert result.update.norms.total == unmeasured.update.norms.total
    chunk_sizes = sizes if probe.each else [sum(sizes)]
    assert result.chunk_squares >= sum(size**2 for size in chunk_sizes)
    return result.update.chunks.item(), result.chunk_squares, plain, chunk_sizes


def _plain_squares(batches: list[tuple[Tensor, Tensor]], all_labels: Tensor) -> float:
    gpt = build_gpt(MODELS["modern"], LENGTH, CPU, torch.float64)
    init_parameters(gpt, seed=0)
    for tokens, labels in batches:
        (gpt(tokens, labels) / (all_labels != IGNORE_LABEL).sum()).backward()
    return sum(p.grad.square().sum().item() for p in gpt.parameters() if p.grad is not None)
