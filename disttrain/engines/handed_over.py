"""An optimizer for engines that want to call one themselves: when it is called, the update is ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from disttrain.engines.protocol import UpdateResult


class HandedOver(torch.optim.Optimizer):
    """Has all `parameters` in one group, of which an engine may make others; `run` is a step of the engine.

    Our optimizers stay what they are: the engine decides when and over which tensors they work, not how.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__([{"params": list(parameters), "lr": 0.0, "betas": (0.0, 0.0), "weight_decay": 0.0}], {})
        self._update: Callable[[], UpdateResult] | None = None
        self._result: UpdateResult | None = None

    def run(self, step_of_engine: Callable[[], Any], update: Callable[[], UpdateResult]) -> UpdateResult | None:
        """What `update` gives, which `step_of_engine` calls; None where it took the gradients for not finite."""
        self._update, self._result = update, None
        step_of_engine()
        self._update = None
        return self._result

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Of the engine only, once for each part that it has cut the parameters into: the first call updates all."""
        if self._update is None:
            raise RuntimeError("the engine has called its optimizer outside of a step")
        if self._result is None:
            self._result = self._update()
