"""What ranks do in test_evaluate.py."""

from __future__ import annotations

import numpy as np
import torch

from disttrain.config import ParallelDims
from disttrain.config.parallel import ParallelConfig, Strategy
from disttrain.data.loader import Microbatch
from disttrain.distributed.mesh import build_mesh
from disttrain.parallel import parameters_will_change
from disttrain.testing.parity import LENGTH, MODELS, global_batch
from disttrain.train.build import build_model
from disttrain.train.evaluate import evaluate

CPU = torch.device("cpu")


def _batches(rank: int, world: int) -> list[Microbatch]:
    tokens, labels = (part.numpy().copy() for part in global_batch(0))
    rows = len(tokens) // world
    mine = slice(rank * rows, (rank + 1) * rows)
    return [Microbatch(tokens[mine], labels[mine])]


def evaluate_write_evaluate(rank: int, world: int, strategy: Strategy) -> list[float]:
    """Losses of seed 0, of seed 1 written over it, and of a model that had seed 1 from the start."""
    models = [
        build_model(
            MODELS["modern"],
            max_length=LENGTH,
            mesh=build_mesh(ParallelDims.resolve(strategy, None, None, world), "cpu"),
            parallel=ParallelConfig(strategy=strategy),
            seed=seed,
            device=CPU,
            dtype=torch.float64,
        )
        for seed in (0, 1)
    ]
    (gpt, model), (other, other_model) = models
    losses = [evaluate(model, _batches(rank, world), None, CPU).loss]
    parameters_will_change(model)
    with torch.no_grad():
        for mine, theirs in zip(gpt.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    losses.append(evaluate(model, _batches(rank, world), None, CPU).loss)
    losses.append(evaluate(other_model, _batches(rank, world), None, CPU).loss)
    return losses


def bits_per_byte(rank: int, world: int) -> tuple[float, float | None, int]:
    """Evaluation where token i stands for i bytes."""
    _, model = build_model(
        MODELS["gpt2"],
        max_length=LENGTH,
        mesh=build_mesh(ParallelDims.resolve("fsdp", None, None, world), "cpu"),
        parallel=ParallelConfig(strategy="fsdp"),
        seed=0,
        device=CPU,
        dtype=torch.float64,
    )
    result = evaluate(model, _batches(rank, world), np.arange(53), CPU)
    return result.loss, result.bits_per_byte, result.tokens
