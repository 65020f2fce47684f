"""Metrics stay on the device until a log step, then cross the ranks in one collective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from disttrain.distributed.collectives import dist_all_gather_rows

Reduction = Literal["sum", "max"]
_EMPTY: dict[str, float] = {"sum": 0.0, "max": -math.inf}


class MetricBuffer:
    """Scalars with a declared reduction, gathered over calls of `add` and over ranks.

    An average is never reduced: add the sum and the count, and divide what comes back.
    """

    def __init__(self, reductions: Mapping[str, Reduction], device: torch.device) -> None:
        self.reductions = dict(reductions)
        self.device = device
        self._values: dict[str, Tensor] = {}
        self._clear()

    def add(self, name: str, value: Tensor | float) -> None:
        """Fold one more value in, without asking the device for it. KeyError for a name that was not declared."""
        value = torch.as_tensor(value, device=self.device).detach().double()
        held = self._values[name]
        self._values[name] = held + value if self.reductions[name] == "sum" else torch.maximum(held, value)

    def reduce(self) -> dict[str, float]:
        """Every metric over all ranks since the last call, and start anew. Collective; the one wait for the device."""
        rows = dist_all_gather_rows(torch.stack(list(self._values.values())))
        columns = rows.cpu().unbind(dim=1)
        self._clear()
        return {
            name: float(column.sum() if reduction == "sum" else column.max())
            for (name, reduction), column in zip(self.reductions.items(), columns, strict=True)
        }

    def _clear(self) -> None:
        self._values = {
            name: torch.tensor(_EMPTY[reduction], dtype=torch.float64, device=self.device)
            for name, reduction in self.reductions.items()
        }
