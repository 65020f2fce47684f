"""Mistakes that the parity table must show, made on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

import disttrain.train.step
from disttrain.engines import Engine, UpdateResult
from disttrain.testing.parity import ParityCase, RecordingEngine, measure_parity


def spoilt_parity(rank: int, world: int, mistake: str, case: ParityCase) -> tuple[float, float]:
    """The errors of a cell whose engine or token count makes `mistake`."""
    count = disttrain.train.step.dist_begin_sum_integers
    if mistake == "a wrong token count":
        disttrain.train.step.dist_begin_sum_integers = lambda *values: lambda: [value * world for value in values]
    try:
        engines = {"a mean in place of a sum": _mean, "a dropped rank": _dropped}
        return measure_parity(rank, world, torch.device("cpu"), case, engines.get(mistake, lambda e: e))
    finally:
        disttrain.train.step.dist_begin_sum_integers = count


def _mean(engine: RecordingEngine) -> Engine:
    return _Scaled(engine, 1 / torch.distributed.get_world_size())


def _dropped(engine: RecordingEngine) -> Engine:
    return _Scaled(engine, float(torch.distributed.get_rank() != 0))


class _Scaled:
    """An engine whose loss is scaled before it goes backward."""

    def __init__(self, engine: RecordingEngine, factor: float) -> None:
        self.engine, self.factor = engine, factor

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        return self.engine.forward(tokens, labels, last)

    def begin_step(self, measure_noise: bool, tokens: Sequence[int], compare_weights: bool = False) -> list[int]:
        return self.engine.begin_step(measure_noise, tokens, compare_weights)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.factor)

    def finish_step(self, lr_factor: float | Sequence[float], loss: Tensor | None = None) -> UpdateResult:
        return self.engine.finish_step(lr_factor, loss)

    def evaluation_weights(self) -> AbstractContextManager[None]:
        return self.engine.evaluation_weights()

    def weights_changed(self) -> None:
        self.engine.weights_changed()

    def state(self) -> dict[str, Tensor]:
        return self.engine.state()

    def loaded(self) -> None:
        self.engine.loaded()
