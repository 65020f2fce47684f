"""Runs whose numbers go bad at chosen steps: what the judge must find, put where real faults put it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from disttrain.config.load import load_config
from disttrain.distributed.env import Ranks
from disttrain.engines import NativeEngine
from disttrain.errors import UserError
from disttrain.optim.sharding import local
from disttrain.parallel import parameters_will_change
from disttrain.train.preflight import prepare_run

VALUES = {"nan": float("nan"), "inf": float("inf"), "spike": 1e4}


@dataclass(frozen=True)
class Fault:
    """On `rank`, in the `step`th step that its process takes (steps that are taken again count anew)."""

    step: int
    rank: int
    where: Literal["loss", "gradient", "parameter"]
    value: Literal["nan", "inf", "spike"]


class SpoiltEngine(NativeEngine):
    """A loss is multiplied by the value; a gradient is, before ranks are put together; a weight is set to it."""

    faults: Sequence[Fault] = ()
    rank = 0

    def begin_step(self, measure_noise: bool, tokens: Sequence[int]) -> list[int]:
        self.taken = getattr(self, "taken", 0) + 1
        if (value := self._value("parameter")) is not None:
            parameters_will_change(self.model)
            with torch.no_grad():
                shard = next(s for p in self.module.parameters() if (s := local(p)).numel())
                shard.view(-1)[0] = value
        return super().begin_step(measure_noise, tokens)

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        loss = super().forward(tokens, labels, last)
        return loss if (value := self._value("loss")) is None else loss * value

    def backward(self, loss: Tensor) -> None:
        super().backward(loss if (value := self._value("gradient")) is None else loss * value)

    def _value(self, where: str) -> float | None:
        for fault in self.faults:
            if (fault.step, fault.rank, fault.where) == (self.taken, self.rank, where):
                return VALUES[fault.value]
        return None


@contextmanager
def spoilt(rank: int, faults: Sequence[Fault]) -> Iterator[None]:
    """Runs that this process builds meanwhile have `faults`."""
    engine = type("SpoiltRun", (SpoiltEngine,), {"faults": tuple(faults), "rank": rank})
    with mock.patch("disttrain.train.build.NativeEngine", engine):
        yield


def spoilt_run(
    rank: int, world: int, config: str, overrides: Sequence[str], faults: Sequence[Fault]
) -> tuple[str, list[str]]:
    """How a run of the `config` file ends in this process group, or with which problems; for the rank pool."""
    from disttrain.train.run import run_training

    run: Any = prepare_run(load_config(Path(config), list(overrides)).config)
    with spoilt(rank, faults), redirect_stdout(io.StringIO()):
        try:
            return run_training(run, Ranks(rank, world, rank, world), torch.device("cpu")), []
        except UserError as error:
            return "failed", list(error.problems)
