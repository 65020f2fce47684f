"""What ranks do in test_evaluation_weights.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.config import OptimConfig
from disttrain.config.parallel import ParallelConfig
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.testing.collectives import CollectiveCounter
from disttrain.testing.optimizer_parity import Toys, drawn_gradients
from disttrain.testing.parity import LENGTH, MODELS, gather_whole, global_batch, parity_model, rank_batches
from disttrain.train.build import build_gpt
from disttrain.train.step import train_step
from tests.optim.resume_jobs import cases

CPU = torch.device("cpu")
OPTIM = OptimConfig(preset="schedule_free_adamw", lr=1e-2)


def trained_and_looked_at(rank: int, world: int, settings: dict[str, Any], looks: bool) -> dict[str, Any]:
    """Three steps with an evaluation after the second: its loss, the same by hand, and the weights at the end."""
    parallel = ParallelConfig(**settings)
    config, kind = MODELS["modern"], torch.float64
    gpt, model = parity_model(config, world, CPU, parallel)
    engine = NativeEngine(gpt, model, build_optimizer(gpt, OPTIM, GPT_PLAN), parallel=parallel, device=CPU)
    seen: dict[str, Any] = {}
    for step in range(3):
        train_step(engine, rank_batches(step, rank, world, 1), lr_factor=1.0, device=CPU)
        if step == 1 and looks:
            with engine.evaluation_weights(), torch.no_grad():
                seen["loss"] = model(*global_batch(9)).item()
                used: dict[str, Tensor] = gather_whole(dict(gpt.named_parameters()))
            alone = build_gpt(config, LENGTH, CPU, kind)
            alone.load_state_dict(used, strict=False)
            with torch.no_grad():
                seen["by_hand"] = alone(*global_batch(9)).item()
                alone.load_state_dict(gather_whole(dict(gpt.named_parameters())), strict=False)
                seen["at_training_weights"] = alone(*global_batch(9)).item()
    return seen | {"weights": gather_whole(dict(gpt.named_parameters()))}


def collectives(rank: int, world: int, settings: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What an update of every optimizer sends."""
    counted = {}
    for name, optim in cases().items():
        toys = Toys(world, CPU, ParallelConfig(**settings))
        optimizer = build_optimizer(toys, optim, GPT_PLAN)
        toys.set_gradients(drawn_gradients(0))
        dist.barrier()
        with CollectiveCounter() as counter:
            optimizer.step()
        counted[name] = dict(counter.calls)
    return counted
