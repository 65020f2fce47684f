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
    where: Literal["loss", "gradient", "parameter", "gathered"]
    value: Literal["nan", "inf", "spike", "flip"]


class SpoiltEngine(NativeEngine):
    """A loss is multiplied by the value; a gradient is, before ranks are put together; a weight is set to it, or has
    a bit flipped, also one that was gathered for the forward."""

    faults: Sequence[Fault] = ()
    rank = 0

    def begin_step(self, measure_noise: bool, tokens: Sequence[int], compare_weights: bool = False) -> list[int]:
        self.taken = getattr(self, "taken", 0) + 1
        if (fault := self._fault("parameter")) is not None:
            parameters_will_change(self.model)
            _spoil(next(s for p in self.module.parameters() if (s := local(p)).numel()), fault)
        return super().begin_step(measure_noise, tokens, compare_weights)

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        hook = None
        if last and (fault := self._fault("gathered")) is not None:
            block = self.module.get_submodule("blocks.0")
            hook = block.register_forward_hook(lambda *_: _spoil(next(block.parameters()), fault))
        loss = super().forward(tokens, labels, last)
        if hook is not None:
            hook.remove()
        return loss if (value := self._value("loss")) is None else loss * value

    def backward(self, loss: Tensor) -> None:
        super().backward(loss if (value := self._value("gradient")) is None else loss * value)

    def _fault(self, where: str) -> Fault | None:
        for fault in self.faults:
            if (fault.step, fault.rank, fault.where) == (self.taken, self.rank, where):
                return fault
        return None

    def _value(self, where: str) -> float | None:
        fault = self._fault(where)
        return VALUES[fault.value] if fault else None


def _spoil(weights: Tensor, fault: Fault) -> None:
    if fault.value == "flip":
        flip_first(weights)
    else:
        weights.data.view(-1)[:1].fill_(VALUES[fault.value])  # autograd does not look at what a fault does


def flip_first(weights: Tensor) -> None:
    """One bit of the first number, which is fp32; the lowest bits heal by rounding."""
    weights.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 16)


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
