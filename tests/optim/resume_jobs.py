"""What ranks do in test_resume.py: toys of every awkward shape under every optimizer, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.manager import CheckpointManager
from disttrain.checkpoint.state import training_state
from disttrain.config import OptimConfig
from disttrain.config.parallel import ParallelConfig
from disttrain.models import GPT_PLAN
from disttrain.optim import OptimizerSet, build_optimizer, set_learning_rate
from disttrain.testing.matrix_parity import CASES, synthetic_optim
from disttrain.testing.optimizer_parity import ALGORITHMS, LR_FACTORS, Toys, drawn_gradients, optim_of

CPU = torch.device("cpu")
HALF = 2
CLIP = {"kind": "none"}


def cases() -> dict[str, OptimConfig]:
    """Every algorithm; narrow states; state that only the owner of a matrix has; a class that is not ours."""
    optims = {name: optim_of(name, own, "square|vector", CLIP) for name, own in ALGORITHMS.items()}
    for name, dtype in (("adamw", "bf16"), ("lion", "bf16"), ("momentum", "int8")):
        optims[f"{name} {dtype}"] = optim_of(name, ALGORITHMS[name] | {"state_dtype": dtype}, "square|vector", CLIP)
    for name, case in CASES.items():
        optims[name] = synthetic_optim(case, "auto")
    # Its state is one number a matrix.
    optims["a user's function"] = synthetic_optim(
        {"algorithm": "tests.optim.matrix_functions:Stacked", "lr": 0.01, "momentum": 0.5}, "auto"
    )
    optims["soap, computed once"] = synthetic_optim(CASES["soap"], "spread")
    optims["torch.optim.NAdam"] = optim_of("torch.optim.NAdam", {"lr": 1e-2}, "square|vector", CLIP)
    optims["torch.optim.Adadelta"] = optim_of("torch.optim.Adadelta", {"lr": 1e-1}, "square|vector", CLIP)
    return optims


class Run:
    """One optimizer over its toys."""

    def __init__(self, world: int, settings: dict[str, Any], optim: OptimConfig) -> None:
        self.toys = Toys(world, CPU, ParallelConfig(**settings))
        self.optimizer: OptimizerSet = build_optimizer(self.toys, optim, GPT_PLAN, seed=5)

    def train(self, steps: range) -> None:
        for step in steps:
            self.toys.set_gradients(drawn_gradients(step))
            set_learning_rate(self.optimizer, LR_FACTORS[step])
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self) -> list[dict[str, Tensor]]:
        """Those that train, and those that are used."""
        training = whole(self.toys)
        with self.optimizer.evaluation_weights():
            return [training, whole(self.toys)]


def whole(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def manager(directory: Path, name: str) -> CheckpointManager:
    return CheckpointManager(LocalStorage(directory / name), keep_last=1, run_id="run")


def save(rank: int, world: int, settings: dict[str, Any], directory: Path) -> dict[str, list[dict[str, Tensor]]]:
    """Train half of the steps and save; the weights at that point."""
    seen = {}
    for name, optim in cases().items():
        run = Run(world, settings, optim)
        run.train(range(HALF))
        facts: dict[str, Any] = {"config": {}, "data": {}, "strategy": settings["strategy"]}
        state = training_state(run.toys, run.optimizer)
        manager(directory, name).save(state, step=HALF, samples=0, tokens=0, **facts)
        seen[name] = run.weights()
    return seen


def resume(rank: int, world: int, settings: dict[str, Any], directory: Path) -> dict[str, list[dict[str, Tensor]]]:
    """Load, and train the rest."""
    seen = {}
    for name, optim in cases().items():
        run = Run(world, settings, optim)
        with torch.no_grad():
            for parameter in run.toys.parameters():
                parameter.zero_()
        checkpoints = manager(directory, name)
        found = checkpoints.latest()
        assert found is not None
        checkpoints.load(training_state(run.toys, run.optimizer), found)
        run.optimizer.loaded()
        run.train(range(HALF, len(LR_FACTORS)))
        seen[name] = run.weights()
    return seen
