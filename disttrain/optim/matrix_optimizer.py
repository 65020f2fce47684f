"""Optimizers that need whole matrices, on shards: momentum where the shards are, the rest with each matrix's owner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.config.algorithms import ALGORITHMS
from disttrain.config.matrix_groups import CustomMatrix, ExchangeConfig, MatrixGroup
from disttrain.errors import UserError
from disttrain.optim.matrix_compute import owner_directions
from disttrain.optim.matrix_exchange import MatrixExchange
from disttrain.optim.matrix_plan import Bucket, MatrixPlan
from disttrain.optim.matrix_setup import Matrix, MatrixSet, Settings, build_matrix_sets
from disttrain.optim.matrix_updates import MOMENTUM, STEP
from disttrain.optim.sharding import local


class MatrixOptimizer(torch.optim.Optimizer):
    """One algorithm of `config.matrix_groups` over parameters that are matrices, on any layout. Collective.

    Each group has `params`, `lr`, and its section as `config`; `names` are for errors and for the plan. State of a
    parameter: `step`, `momentum_buffer` cut as it is (where there is momentum), and the algorithm's own, whole, with
    the owner. A matrix without a gradient counts as one with a gradient of zero, on every process alike. Raises
    UserError for parameters that are no matrices, splits that do not fit, and plans that differ between processes.
    """

    def __init__(
        self, groups: list[Settings], names: Mapping[nn.Parameter, str], exchange: ExchangeConfig | None = None
    ) -> None:
        super().__init__(groups, {})
        settings = exchange or ExchangeConfig()
        self._batched = settings.batched
        self._sets = build_matrix_sets(self.param_groups, names, settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][STEP] = torch.zeros((), dtype=torch.float64)
                if group["config"].momentum:
                    self.state[parameter][MOMENTUM] = torch.zeros_like(parameter, requires_grad=False)
        for owned in self._sets:
            for matrix, entries in zip(owned.matrices, owned.entries, strict=True):
                self.state[matrix.parameter].update(entries)

    @property
    def plans(self) -> list[MatrixPlan]:
        """What is exchanged, one plan for each layout and type on the wire."""
        return [owned.exchange.plan for owned in self._sets]

    def describe(self) -> list[str]:
        """A line for each plan, and why copies of the model share the computation or do not."""
        return [plan.summary() for plan in self.plans] + [owned.note for owned in self._sets if owned.note]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Of the constructor only: owners are chosen for all matrices together."""
        if hasattr(self, "_sets"):
            raise UserError("a matrix optimizer takes no more groups once it is made: give it all of them at the start")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the tensors and groups that are there, of a `state_dict` on the same layout; else UserError.

        disttrain's checkpoints load on any layout.
        """
        groups, states = self.param_groups, self.state
        super().load_state_dict(state_dict)
        loaded = (self.param_groups, self.state)
        self.param_groups, self.state = groups, states
        for group, other in zip(groups, loaded[0], strict=True):
            group.update({key: value for key, value in other.items() if key not in ("params", "config")})
        for parameter, state in states.items():
            for key, kept in state.items():
                value = loaded[1].get(parameter, {}).get(key)
                if value is None or local(value).shape != local(kept).shape:
                    found = "is missing" if value is None else f"has the shape {tuple(local(value).shape)}"
                    raise UserError(f"state_dict: {key} {found}, where this rank holds {tuple(local(kept).shape)}")
                local(kept).copy_(local(value))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for state in self.state.values():
            state[STEP] += 1
        dist_in_software_pipeline(
            self._dist_update(owned, bucket) for owned in self._sets for bucket in owned.exchange.plan.buckets
        )
        return loss

    def _dist_update(self, owned: MatrixSet, bucket: Bucket) -> Iterator[None]:
        """One bucket, stage by stage: between stages it travels."""
        exchange, matrices = owned.exchange, owned.matrices
        travelling = exchange.dist_collect(bucket, {u: self._part(matrices[u], exchange) for u in bucket.units})
        yield
        wholes = travelling.wait()
        del travelling  # what has arrived is freed before the products need their room
        directions = owner_directions(owned, wholes, self._step_of, self._batched)
        travelling = exchange.dist_give_back(bucket, directions)
        yield
        if exchange.plan.spread:
            travelling = exchange.dist_share(bucket, travelling.wait())
            yield
        for unit, direction in travelling.wait().items():
            _apply(matrices[unit], direction)

    def _step_of(self, matrix: Matrix) -> Tensor:
        return self.state[matrix.parameter][STEP]

    def _part(self, matrix: Matrix, exchange: MatrixExchange) -> Tensor:
        """What this shard sends of a matrix: its gradient, or the momentum that takes its place."""
        config, parameter, gradient = matrix.group["config"], matrix.parameter, matrix.parameter.grad
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            # The same unless somebody's own parallelism left sums undone; then on every process alike.
            gradient = gradient.redistribute(placements=parameter.placements)
        if gradient is None:
            part = torch.zeros_like(local(parameter)[matrix.held])
        else:
            part = local(gradient)[matrix.held]
        if config.momentum:
            buffer = local(self.state[parameter][MOMENTUM])[matrix.held]
            buffer.lerp_(part, 1 - config.momentum)
            part = part.lerp(buffer, config.momentum) if config.nesterov else buffer
        return part.to(exchange.layout.device, exchange.dtype)


def matrix_optimizer(
    algorithm: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    exchange: ExchangeConfig | None = None,
    **settings: Any,
) -> MatrixOptimizer:
    """A matrix optimizer by name (`muon`, `package.module:name`) for a loop of one's own, used as any of torch's.

    `settings` are those of the algorithm's config section. Hand it hidden matrices only, plain (alone or under DDP) or
    sharded, after the model was parallelised; frozen ones are left out. Raises UserError as `MatrixOptimizer`, and for
    an unknown algorithm or setting.
    """
    section, name = ALGORITHMS.get(algorithm, CustomMatrix), algorithm.rpartition(":")[2]
    if not issubclass(section, MatrixGroup):
        raise UserError(f"{algorithm}: works on elements, not on whole matrices: take torch.optim's")
    if "clip" in settings:
        raise UserError("clip: an optimizer does not clip; call disttrain.optim.dist_clip_gradients, or torch's")
    try:
        config = section.model_validate({"name": name, "match": (".*",), "algorithm": algorithm, "lr": lr, **settings})
    except ValidationError as error:
        raise UserError(
            f"{algorithm}: {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        ) from error
    names = {parameter: name for name, parameter in named_parameters if parameter.requires_grad}
    return MatrixOptimizer([{"name": name, "params": list(names), "lr": lr, "config": config}], names, exchange)


def dist_in_software_pipeline(tasks: Iterable[Iterator[None]]) -> None:
    """Run tasks that stop where they wait for what they sent.

    In each round the next one starts, then each running one takes a stage, the newest first, so that what travels has
    the computation of others to hide behind.
    """
    running: list[Iterator[None]] = []
    for task in tasks:
        running = [one for one in (task, *running) if _advances(one)]
    while running:
        running = [one for one in running if _advances(one)]


def _advances(task: Iterator[None]) -> bool:
    """Take one stage; False when it was the last."""
    return next(task, _ENDED) is not _ENDED


_ENDED = object()


def _apply(matrix: Matrix, direction: Tensor) -> None:
    lr, decay = float(matrix.group["lr"]), matrix.group["config"].weight_decay
    weight = local(matrix.parameter)[matrix.held]
    weight.mul_(1 - lr * decay)
    weight.add_(direction.to(weight.device), alpha=-lr * matrix.scale)
