"""Twenty steps of one small model under every engine, in one process group."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.manager import CheckpointManager
from disttrain.checkpoint.rollback import roll_back
from disttrain.config import RunConfig
from disttrain.distributed.env import Ranks, tell_engines
from disttrain.testing.bad_numbers import flip_first
from disttrain.testing.parity import MODELS, rank_batches
from disttrain.train.build import Training, build_training
from disttrain.train.preflight import open_config_data
from disttrain.train.step import train_step

CPU = torch.device("cpu")
CLIP = 0.5


def build(cache: Path, world: int, rank: int, settings: dict[str, Any]) -> Training:
    """`settings` are sections of the config; `engine` and a strategy are among them."""
    _forget_engines()
    tell_engines(Ranks(rank, world, rank, world), on_cpu=True)
    table = {
        "device": "cpu",
        "model": MODELS["modern"].model_dump() | {"tie_embeddings": True} | settings.pop("model", {}),
        "data": {"source": "synthetic", "tokenizer": "bytes", "cache_dir": str(cache)},
        "train": {"steps": 20, "global_batch_tokens": 24 * 7, "microbatch_size": 2, "sequence_length": 7},
        "optim": {"lr": 1e-3, "clip_norm": CLIP, "weight_decay": 0.1},
        "monitor": {"noise_scale_every": 0},
    }
    config = RunConfig.model_validate(table | settings)
    return build_training(config, open_config_data(config), Ranks(rank, world, rank, world), CPU)


def steps(parts: Training, rank: int, world: int, numbers: range, accumulation: int) -> list[tuple[float, float]]:
    """The summed loss of this rank over all tokens, and the norm of the gradients, of each step."""
    seen = []
    for number in numbers:
        # In every other step one microbatch less, as a ramp has it, and a rate of its own in each, as a schedule gives.
        batches = rank_batches(number, rank, world, accumulation - number % 2)
        result = train_step(parts.engine, batches, lr_factor=1 / (1 + number % 5), device=CPU)
        seen.append((result.loss_sum.item() / result.valid_tokens, result.update.grad_norm.item()))
    return seen


def weights(parts: Training) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in parts.engine.state().items() if name.startswith("model.")}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(rank: int, world: int, cache: Path, cases: dict[str, dict[str, Any]], accumulation: int = 3) -> Any:
    """By case: losses and norms of this rank, the whole final weights, and the classes of the optimizers."""
    found = {}
    for name, settings in cases.items():
        parts = build(cache, world, rank, settings)
        seen = steps(parts, rank, world, range(20), accumulation)
        classes = sorted({group["class"] for group in parts.optimizer.param_groups})
        found[name] = (seen, weights(parts) if rank == 0 else weights(parts) and {}, classes)
    return found


def move(rank: int, world: int, cache: Path, folder: Path, cases: dict[str, dict[str, Any]]) -> Any:
    """Ten steps under the first case, its checkpoint loaded by each of the others, and ten more under each."""
    names = list(cases)
    about = {"step": 10, "samples": 0, "tokens": 0, "config": {}, "data": {}, "strategy": ""}
    first = build(cache, world, rank, cases[names[0]])
    steps(first, rank, world, range(10), 2)
    manager = CheckpointManager(LocalStorage(folder), 2, "run")
    manager.save(first.engine.state(), **about)
    found = {names[0]: steps(first, rank, world, range(10, 20), 2)}
    for name in names[1:]:
        parts = build(cache, world, rank, cases[name])
        info = manager.latest()
        assert info is not None
        assert manager.load(parts.engine.state(), info) == []
        parts.engine.loaded()
        found[name] = steps(parts, rank, world, range(10, 20), 2)
    return found


def go_back(rank: int, world: int, cache: Path, folder: Path, cases: dict[str, dict[str, Any]]) -> Any:
    """A rollback that finds the newest of two checkpoints no good: whether the weights are those of the other one."""
    found = {}
    about = {"samples": 0, "tokens": 0, "config": {}, "data": {}, "strategy": ""}
    for name, settings in cases.items():
        parts = build(cache, world, rank, settings)
        manager = CheckpointManager(LocalStorage(folder / name.replace(" ", "-")), 2, "run")
        kept = []
        for step in (1, 2):
            steps(parts, rank, world, range(step, step + 1), 2)
            kept.append(weights(parts))
            manager.save(parts.engine.state(), step=step, **about)
        answers = iter((False, True))

        def good(parts: Training = parts, answers: Iterator[bool] = answers) -> bool:
            parts.engine.loaded()
            return next(answers)

        info = roll_back(manager, parts.engine.state(), 3, good)
        assert info is not None
        now = weights(parts)
        found[name] = info.manifest.step, [all(torch.equal(now[key], then[key]) for key in now) for then in kept]
    return found


def evaluate_between(rank: int, world: int, cache: Path, cases: dict[str, dict[str, Any]]) -> Any:
    """By case: this rank's losses of steps, and of three batches without a backward behind every second one."""
    found = {}
    for name, settings in cases.items():
        parts = build(cache, world, rank, settings)
        seen = []
        for first in range(0, 6, 2):
            seen += [loss for loss, _ in steps(parts, rank, world, range(first, first + 2), 2)]
            with parts.engine.evaluation_weights(), torch.no_grad():
                seen += [parts.model(*batch).item() for batch in rank_batches(100, rank, world, 3)]
        found[name] = seen
    return found


def flip(rank: int, world: int, cache: Path, cases: dict[str, dict[str, Any]]) -> Any:
    """What two steps' comparisons of weights see, where a bit of the last rank's first weight turns over in between."""
    found = {}
    for name, settings in cases.items():
        parts = build(cache, world, rank, settings)
        sums = []
        for number in range(2):
            if number == 1 and rank == world - 1:
                flip_first(next(parts.model.parameters()).detach())
            batches = rank_batches(number, rank, world, 2)
            result = train_step(parts.engine, batches, lr_factor=1.0, device=CPU, compare_weights=True)
            assert result.update.weight_sums is not None
            sums.append(result.update.weight_sums.tolist())
        found[name] = sums
    return found


def skip(rank: int, world: int, cache: Path, cases: dict[str, dict[str, Any]]) -> Any:
    """A step whose loss is not finite on the last rank, between good ones: verdicts, and what the weights did."""
    found = {}
    for name, settings in cases.items():
        parts = build(cache, world, rank, settings)
        seen = []
        for number in range(3):
            before = weights(parts)
            batches = rank_batches(number, rank, world, 2)
            engine = parts.engine
            if number == 1 and rank == world - 1:
                engine = _Spoilt(engine)
            result = train_step(engine, batches, lr_factor=1.0, device=CPU)
            after = weights(parts)
            moved = any(not torch.equal(before[key], after[key]) for key in before)
            seen.append((int(result.update.verdict), float(result.update.skipped), moved))
        found[name] = seen
    return found


class _Spoilt:
    """An engine whose backwards get a loss that is no number."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * float("nan"))


def _forget_engines() -> None:
    """Both keep what they were told first in a process: a job here is a process of its own to them."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm.comm
    import deepspeed.utils.groups

    groups = vars(deepspeed.utils.groups)
    if not _UNUSED:
        _UNUSED.update(groups)
    if deepspeed.comm.comm.cdb is not None and _GROUP[:1] != [dist.group.WORLD]:
        groups.update(_UNUSED)
        deepspeed.comm.comm.cdb = None
    _GROUP[:] = [dist.group.WORLD]


_UNUSED: dict[str, Any] = {}
"""The groups that DeepSpeed has before it has made any."""
_GROUP: list[Any] = []
"""The process group that it has made them from."""
