"""Optimizers that need whole matrices, on shards: momentum where the shards are, the rest with each matrix's owner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.config.algorithms import ALGORITHMS
from disttrain.config.matrix_groups import CustomMatrix, ExchangeConfig
from disttrain.optim.matrix_exchange import MatrixExchange
from disttrain.optim.matrix_plan import Bucket, MatrixPlan
from disttrain.optim.matrix_setup import Matrix, Settings, Stream, build_streams
from disttrain.optim.matrix_updates import STEP
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
        self._streams = build_streams(self.param_groups, names, settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][STEP] = torch.zeros((), dtype=torch.float64)
                if group["config"].momentum:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        for stream in self._streams:
            for matrix, entries in zip(stream.matrices, stream.entries, strict=True):
                self.state[matrix.parameter].update(entries)

    @property
    def plans(self) -> list[MatrixPlan]:
        """What is exchanged, one plan for each layout and type on the wire."""
        return [stream.exchange.plan for stream in self._streams]

    def describe(self) -> list[str]:
        """A line for each plan, and why copies of the model share the computation or do not."""
        return [plan.summary() for plan in self.plans] + [stream.note for stream in self._streams if stream.note]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for state in self.state.values():
            state[STEP] += 1
        in_software_pipeline(
            self._update(stream, bucket) for stream in self._streams for bucket in stream.exchange.plan.buckets
        )

    def _update(self, stream: Stream, bucket: Bucket) -> Iterator[None]:
        """One bucket, stage by stage: between stages it travels."""
        exchange, matrices = stream.exchange, stream.matrices
        # One name for all that travels: what has arrived is freed.
        travelling = exchange.collect(bucket, {index: self._part(matrices[index], exchange) for index in bucket.units})
        yield
        travelling = exchange.give_back(bucket, self._directions(stream, travelling.wait()))
        yield
        if exchange.plan.spread:
            travelling = exchange.share(bucket, travelling.wait())
            yield
        for index, direction in travelling.wait().items():
            _apply(matrices[index], direction)

    def _part(self, matrix: Matrix, exchange: MatrixExchange) -> Tensor:
        """What this shard sends of a matrix: its gradient, or the momentum that takes its place."""
        config, gradient = matrix.group["config"], matrix.parameter.grad
        if gradient is None:
            part = torch.zeros_like(local(matrix.parameter)[matrix.held])
        else:
            part = local(gradient)[matrix.held]
        if config.momentum:
            buffer = local(self.state[matrix.parameter]["momentum_buffer"])[matrix.held]
            buffer.lerp_(part, 1 - config.momentum)
            part = part.lerp(buffer, config.momentum) if config.nesterov else buffer
        return part.to(exchange.layout.device, exchange.dtype)

    def _directions(self, stream: Stream, wholes: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Of the matrices that this process owns; equal shapes of one group as a stack, where the algorithm can."""
        stacks: dict[Any, list[int]] = {}
        for index, whole in wholes.items():
            matrix = stream.matrices[index]
            together = self._batched and matrix.update.batched
            stacks.setdefault((id(matrix.group), whole.shape) if together else index, []).append(index)
        directions: dict[int, Tensor] = {}
        for members in stacks.values():
            directions |= (
                self._stacked(stream, members, wholes)
                if len(members) > 1
                else {index: self._one(stream, index, wholes[index]) for index in members}
            )
        return directions

    def _one(self, stream: Stream, index: int, whole: Tensor) -> Tensor:
        matrix = stream.matrices[index]
        # The parameter's type again: a matrix that travelled in fewer bits is computed as any other.
        whole = whole.to(matrix.parameter.dtype)
        return matrix.update(matrix.name, whole, stream.states[index], self.state[matrix.parameter][STEP])

    def _stacked(self, stream: Stream, members: list[int], wholes: Mapping[int, Tensor]) -> dict[int, Tensor]:
        first, states = stream.matrices[members[0]], [stream.states[index] for index in members]
        whole = torch.stack([wholes[index] for index in members]).to(first.parameter.dtype)
        stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
        directions = first.update(first.name, whole, stacked, self.state[first.parameter][STEP])
        for key, values in stacked.items():
            for state, value in zip(states, values, strict=True):
                state[key].copy_(value)
        return dict(zip(members, directions, strict=True))


def matrix_optimizer(
    algorithm: str, named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, **settings: Any
) -> MatrixOptimizer:
    """A matrix optimizer by name (`muon`, `package.module:name`) for a loop of one's own, used as any of torch's.

    `settings` are those of the algorithm's config section, and `exchange`. Hand it hidden matrices only, plain (alone
    or under DDP) or sharded, after the model was parallelised; torch's schedulers work. Raises as `MatrixOptimizer`.
    """
    exchange = settings.pop("exchange", None)
    section = ALGORITHMS.get(algorithm, CustomMatrix)
    name = algorithm.rpartition(":")[2]
    config = section.model_validate({"name": name, "match": (".*",), "algorithm": algorithm, "lr": lr, **settings})
    names = {parameter: name for name, parameter in named_parameters}
    return MatrixOptimizer([{"name": name, "params": list(names), "lr": lr, "config": config}], names, exchange)


def in_software_pipeline(tasks: Iterable[Iterator[None]]) -> None:
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
