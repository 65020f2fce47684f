"""Optimizers from config. torch's own are right and fast on shards, so sgd to adamw are wrapped, not rewritten."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.config import OptimConfig
from disttrain.config.groups import Custom, Group
from disttrain.config.matrix_groups import ExchangeConfig, MatrixGroup
from disttrain.errors import UserError
from disttrain.models import ShardingPlan
from disttrain.optim.adafactor import Adafactor
from disttrain.optim.adapter import AdaptedOptimizer, self_test
from disttrain.optim.elementwise import AdEMAMix, Lion, ScheduleFreeAdamW
from disttrain.optim.matrix_optimizer import MatrixOptimizer
from disttrain.optim.matrix_split import matrix_problems
from disttrain.optim.optimizer_set import OptimizerSet
from disttrain.optim.param_groups import assign_groups
from disttrain.optim.sharding import local
from disttrain.optim.state_precision import LowPrecisionStates

Groups = list[dict[str, Any]]
_HYPERPARAMETERS = ("lr", "weight_decay", "betas", "eps", "alpha", "momentum")


def build_optimizer(model: nn.Module, config: OptimConfig, plan: ShardingPlan, *, seed: int = 0) -> OptimizerSet:
    """The optimizers over the parameters of `model` (not wrapped in DDP), with all their state from the start.

    `seed` is that of stochastic rounding. Raises UserError for rules that do not fit the model and for classes that do
    not work on shards, on every rank alike.
    """
    assigned = assign_groups(model.named_parameters(), config.resolved_groups, plan.roles, not config.groups)
    _check_matrices(assigned, plan)
    names = {parameter: name for _, members in assigned for name, parameter in members.items()}
    kinds: dict[str, Groups] = {}
    for group, members in assigned:
        # One optimizer for all groups that agree in what is not a group's own hyperparameter.
        kind = repr((group.algorithm, getattr(group, "state_dtype", None), getattr(group, "arguments", None)))
        kinds.setdefault(kind, []).append(_torch_group(group, list(members.values())))
    return OptimizerSet([_build(groups, names, seed, config.exchange) for groups in kinds.values()], names)


def set_learning_rate(optimizer: OptimizerSet, factor: float | Sequence[float]) -> None:
    """Each group's rate is its initial one times `factor` (its own, of a sequence): computed from the position, never
    carried over."""
    groups = optimizer.param_groups
    factors = [factor] * len(groups) if isinstance(factor, float | int) else factor
    for group, own in zip(groups, factors, strict=True):
        group["lr"] = group["initial_lr"] * own


def _check_matrices(assigned: Sequence[tuple[Group, Mapping[str, nn.Parameter]]], plan: ShardingPlan) -> None:
    problems = [
        problem
        for group, members in assigned
        if isinstance(group, MatrixGroup)
        for problem in matrix_problems(
            group, {name: parameter.shape for name, parameter in members.items()}, plan.roles.get("embeddings")
        )
    ]
    if problems:
        raise UserError(problems)


def _torch_group(group: Group, parameters: list[nn.Parameter]) -> dict[str, Any]:
    settings = {key: getattr(group, key) for key in _HYPERPARAMETERS if hasattr(group, key)}
    return {"name": group.name, "params": parameters, "initial_lr": group.lr, "config": group, **settings}


def _build(groups: Groups, names: Mapping[nn.Parameter, str], seed: int, exchange: ExchangeConfig) -> Any:
    config: Group = groups[0]["config"]
    if isinstance(config, MatrixGroup):
        return MatrixOptimizer(groups, names, exchange)
    if isinstance(config, Custom):
        self_test(config)
        return AdaptedOptimizer(groups)
    build, moments = _ALGORITHMS[config.algorithm]
    optimizer = build(groups)
    if isinstance(optimizer, torch.optim.SGD | torch.optim.RMSprop | torch.optim.Adam):
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter] = _initial_state(parameter, moments, counted=config.algorithm in _COUNTED)
    if isinstance(optimizer, torch.optim.Adam):
        _work_on_shards(optimizer)
    dtype: Any = getattr(config, "state_dtype", "parameter")
    return optimizer if dtype == "parameter" else LowPrecisionStates(optimizer, names, moments, dtype, seed)


def _initial_state(parameter: nn.Parameter, moments: tuple[str, ...], counted: bool) -> dict[str, Tensor]:
    """What torch makes lazily in its first step; a resumed run needs it before, equal on every rank."""
    step = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)} if counted else {}
    return step | {
        key: torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False) for key in moments
    }


def _work_on_shards(optimizer: torch.optim.Adam) -> None:
    """Give it what this rank holds: DTensor would dispatch its lists of tensors at as much time as small updates take,
    and keep what it derives of them."""
    # A proxy, else the optimizer would hold itself, and its state stay after it until the garbage collector comes.
    collect, itself = type(optimizer)._init_group, weakref.proxy(optimizer)

    def collect_shards(group: dict[str, Any], *lists: list[Tensor]) -> bool:
        complex_numbers = collect(itself, group, *lists)
        for tensors in lists:
            tensors[:] = [local(tensor) for tensor in tensors]
        return complex_numbers

    optimizer._init_group = collect_shards  # type: ignore[method-assign]


def _sgd(groups: Groups) -> torch.optim.Optimizer:
    # The fused one does not know DTensors.
    return torch.optim.SGD(groups, foreach=True)


def _nesterov(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.SGD([group | {"nesterov": True} for group in groups], foreach=True)


_COUNTED = ("rmsprop", "adam", "adamw")
_ALGORITHMS: dict[str, tuple[Callable[[Groups], torch.optim.Optimizer], tuple[str, ...]]] = {
    "sgd": (_sgd, ()),
    "momentum": (_sgd, ("momentum_buffer",)),
    "nesterov": (_nesterov, ("momentum_buffer",)),
    "rmsprop": (lambda groups: torch.optim.RMSprop(groups, foreach=True), ("square_avg",)),
    "adam": (lambda groups: torch.optim.Adam(groups, fused=True), ("exp_avg", "exp_avg_sq")),
    "adamw": (lambda groups: torch.optim.AdamW(groups, fused=True), ("exp_avg", "exp_avg_sq")),
    "lion": (Lion, Lion.moments),
    "ademamix": (AdEMAMix, AdEMAMix.moments),
    "adafactor": (Adafactor, ()),
    "schedule_free_adamw": (ScheduleFreeAdamW, ()),
}
"""How each is built, and which of its states may be kept in fewer bits."""
