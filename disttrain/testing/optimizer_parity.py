"""Optimizers and clipping on shards against naive references in one process, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from disttrain.config import OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN, ShardingPlan, init_parameters
from disttrain.optim import OptimizerSet, build_optimizer, build_safeguards, set_learning_rate
from disttrain.optim.param_groups import assign_groups
from disttrain.parallel.fsdp import apply_fsdp
from disttrain.testing.parity import (
    LENGTH,
    MODELS,
    ParityRow,
    gather_whole,
    global_batch,
    parity_model,
    place,
    rank_batches,
    tensor_error,
)
from disttrain.testing.pool import RankPool
from disttrain.testing.reference import ReferenceOptimizer, reference_training
from disttrain.train.build import build_gpt
from disttrain.train.step import train_step

WORLDS = (2, 4)
STEPS = 5
SYNTHETIC_TOLERANCE = 1e-12
TRAINING_TOLERANCE = 1e-10
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "fsdp": {"strategy": "fsdp"},
    "hsdp": {"strategy": "hsdp", "dp_replicate": 2},
}
SHAPES = {"square": (6, 6), "wide": (3, 10), "tall": (11, 4), "one_row": (1, 5), "zero": (5, 2), "vector": (7,)}
LR_FACTORS = (0.5, 1.0, 0.7, 0.2, 0.9)

ALGORITHMS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.05},
    "nesterov": {"lr": 0.05, "momentum": 0.8},
    "rmsprop": {"lr": 1e-3, "eps": 1e-6},
    "adam": {"lr": 1e-2, "eps": 1e-6},
    "adamw": {"lr": 1e-2, "eps": 1e-6},
    "lion": {"lr": 3e-3},
    "ademamix": {"lr": 1e-2, "eps": 1e-6, "alpha_warmup_steps": 3, "beta3_warmup_steps": 4},
    "adafactor": {"lr": 0.3, "weight_decay": 0.01},
    "schedule_free_adamw": {"lr": 1e-2, "eps": 1e-6, "weight_power": 1.0},
}
CLIPS: dict[str, dict[str, Any]] = {
    "nothing": {"kind": "none"},
    "value": {"kind": "value", "limit": 0.01},
    "group norm": {"kind": "norm", "limit": 0.2},
    "norm of all": {"kind": "norm", "limit": 0.3, "over": "all"},
    "1-norm": {"kind": "norm", "limit": 2.0, "p": 1},
    "3-norm of all": {"kind": "norm", "limit": 0.1, "p": 3, "over": "all"},
    "inf-norm": {"kind": "norm", "limit": 0.02, "p": "inf"},
}

Spoil = Callable[[OptimizerSet], None]


def optimizer_table(
    pool: RankPool, worlds: tuple[int, ...] = WORLDS, algorithm: str | None = None
) -> Iterator[ParityRow]:
    """A row for each algorithm on drawn gradients, for each in training, and for each clipping under AdamW.

    With `algorithm`, only its rows; it may be a class of the user's.
    """
    for world in worlds:
        for strategy, settings in STRATEGIES.items():
            job = {"device": pool.device, "settings": settings, "algorithm": algorithm}
            drawn = pool.run("disttrain.testing.optimizer_parity:synthetic_job", world, 120, **job)[0]
            for name, error in drawn.items():
                yield ParityRow(strategy, world, f"{name}, drawn gradients", "parameters", error, SYNTHETIC_TOLERANCE)
            trained = pool.run("disttrain.testing.optimizer_parity:training_job", world, 240, **job)[0]
            for name, error in trained.items():
                yield ParityRow(strategy, world, f"{name}, training", "parameters", error, TRAINING_TOLERANCE)


def optim_of(algorithm: str, settings: dict[str, Any], split: str, clip: dict[str, Any]) -> OptimConfig:
    """Two groups of one algorithm: names that match `split`, and the rest, which has its own rate and decay."""
    first = {"name": "first", "match": [split], "algorithm": algorithm, "clip": clip, **settings}
    rest = {**first, "name": "rest", "match": [".*"], "lr": settings["lr"] / 2, "weight_decay": 0.03}
    return OptimConfig.model_validate({"groups": [first, rest]})


# What ranks do.


def synthetic_job(
    rank: int,
    world: int,
    device: str,
    settings: dict[str, Any],
    spoil: Spoil = lambda optimizer: None,
    algorithm: str | None = None,
) -> dict[str, float]:
    """The largest error of every algorithm after steps with the same drawn gradients on every layout."""
    errors = {}
    for name, own in _chosen(algorithm).items():
        optim = optim_of(name, own, "square|vector", CLIPS["nothing"])
        errors[name] = synthetic_error(world, place(device, rank), settings, optim, spoil)
    return errors


def training_job(
    rank: int, world: int, device: str, settings: dict[str, Any], algorithm: str | None = None
) -> dict[str, float]:
    """The largest error of the weights after training a GPT: every algorithm at one clip, every clip under AdamW."""
    cells = {name: (name, own, CLIPS["norm of all"]) for name, own in _chosen(algorithm).items()}
    if algorithm is None:
        cells |= {f"clip: {name}": ("adamw", ALGORITHMS["adamw"], clip) for name, clip in CLIPS.items()}
    return {
        name: training_error(
            rank, world, place(device, rank), settings, optim_of(algorithm, own, "role:matrices", clip)
        )
        for name, (algorithm, own, clip) in cells.items()
    }


def _chosen(algorithm: str | None) -> dict[str, dict[str, Any]]:
    return ALGORITHMS if algorithm is None else {algorithm: ALGORITHMS.get(algorithm, {"lr": 1e-2})}


class Toys(nn.Module):
    """Parameters of every awkward shape, cut as a strategy cuts a model."""

    def __init__(
        self, world: int, device: torch.device, parallel: ParallelConfig, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in SHAPES.items():
            whole = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(whole.to(device, dtype)))
        if parallel.strategy != "ddp":
            dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
            apply_fsdp(self, build_mesh(dims, device.type), ShardingPlan((), {}, ()), parallel)

    def set_gradients(self, gradients: dict[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            gradient = gradients[name].to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient


def drawn_gradients(step: int) -> dict[str, Tensor]:
    """Whole gradients: of full rank, of rank one (`tall`), of one row, and zero."""
    generator = torch.Generator().manual_seed(100 + step)
    gradients = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}
    gradients["tall"] = torch.outer(gradients["tall"][:, 0], gradients["tall"][0])
    gradients["zero"].zero_()
    return gradients


def synthetic_error(
    world: int,
    device: torch.device,
    settings: dict[str, Any],
    optim: OptimConfig,
    spoil: Spoil = lambda optimizer: None,
) -> float:
    """The largest relative error of the weights after steps with drawn gradients."""
    toys = Toys(world, device, ParallelConfig(**settings))
    start = gather_whole(dict(toys.named_parameters()))
    optimizer = build_optimizer(toys, optim, GPT_PLAN)
    reference = ReferenceOptimizer(optimizer.groups, start)
    spoil(optimizer)
    for step, factor in enumerate(LR_FACTORS):
        toys.set_gradients(drawn_gradients(step))
        set_learning_rate(optimizer, factor)
        optimizer.step()
        optimizer.zero_grad()
        reference.step(drawn_gradients(step), factor)
    return _error(dict(toys.named_parameters()), optimizer, reference)


def training_error(
    rank: int,
    world: int,
    device: torch.device,
    settings: dict[str, Any],
    optim: OptimConfig,
    *,
    model: str = "modern",
    accumulation: int = 1,
    spoil: Callable[[NativeEngine], None] = lambda engine: None,
) -> float:
    """The largest relative error of a GPT's weights after training; judged by rank 0, the others return zero."""
    parallel = ParallelConfig(**settings)
    gpt, called = parity_model(MODELS[model], world, device, parallel)
    optimizer = build_optimizer(gpt, optim, GPT_PLAN)
    safeguards = build_safeguards(gpt, optimizer, optim, GPT_PLAN, device=device, steps=STEPS)
    engine = NativeEngine(gpt, called, optimizer, parallel=parallel, device=device, safeguards=safeguards)
    spoil(engine)
    for step in range(STEPS):
        train_step(engine, rank_batches(step, rank, world, accumulation), lr_factor=1.0, device=device)
    end = gather_whole(dict(gpt.named_parameters()))
    if rank:
        return 0.0
    expected = trained_alone(optim.model_dump_json(), model)
    return max(tensor_error(name, end[name], weight) for name, weight in expected.items())


@cache
def trained_alone(optim: str, model: str) -> dict[str, Tensor]:
    """The weights after the same steps in one process, whatever the layout they are compared with; `optim` is JSON."""
    gpt = build_gpt(MODELS[model], LENGTH, torch.device("cpu"), torch.float64)
    init_parameters(gpt, seed=0)
    start = {name: parameter.detach() for name, parameter in gpt.named_parameters()}
    section = OptimConfig.model_validate_json(optim, strict=False)
    # Only the rules: building optimizers may need the other ranks.
    assigned = assign_groups(gpt.named_parameters(), section.resolved_groups, GPT_PLAN.roles, not section.groups)
    groups = [(group, list(members)) for group, members in assigned]
    batches = [global_batch(step) for step in range(STEPS)]
    return reference_training(MODELS[model], groups, start, batches, section)[1]


def _error(parameters: dict[str, nn.Parameter], optimizer: OptimizerSet, reference: ReferenceOptimizer) -> float:
    """Of the weights that train, and of those that are used, after the same steps."""
    used: dict[str, Tensor] = {}
    with optimizer.evaluation_weights():
        used = gather_whole(parameters)
    pairs = [(gather_whole(parameters), reference.weights), (used, reference.evaluation_weights())]
    return max(tensor_error(n, seen[n], weight) for seen, expected in pairs for n, weight in expected.items())
