"""How large weights are, and how far a step moves them: from a sample of rows that no layout changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from disttrain.optim.sharding import copies, first_element, local, world_size

SAMPLED_ELEMENTS = 65_536
"""Of each parameter: rows at equal distances with so many elements together, so that no step needs a second copy of
the weights. Smaller parameters are measured whole."""


class UpdateSizes:
    """Around an optimizer's step: `before` and `after`. `groups` are torch's parameter groups."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], sampled_elements: int = SAMPLED_ELEMENTS) -> None:
        self.parameters = [list(group["params"]) for group in groups]
        self._rows = {p: _sampled_rows(p, sampled_elements) for group in self.parameters for p in group}
        self._copies = {p: copies(p, world_size()) for p in self._rows}
        self._before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def before(self) -> None:
        self._before = {p: self._sample(p).clone() for p in self._rows}

    @torch.no_grad()
    def after(self) -> list[tuple[Tensor, Tensor, float]]:
        """This rank's part of each group: squares of the update and of the weights before it, summed, and the number of
        elements behind them. The sums over ranks count every sampled element once."""
        before, self._before = self._before, {}
        result = []
        for group in self.parameters:
            old = [before[p] for p in group]
            moved = [self._sample(p) - start for p, start in zip(group, old, strict=True)]
            shares = torch.tensor([1 / self._copies[p] for p in group], dtype=torch.float64, device=old[0].device)
            updates, weights = ((_squares(tensors) * shares).sum() for tensors in (moved, old))
            result.append((updates, weights, sum(t.numel() / self._copies[p] for p, t in zip(group, old, strict=True))))
        return result

    def _sample(self, parameter: Tensor) -> Tensor:
        shard = local(parameter).detach()
        return shard[self._rows[parameter]] if shard.dim() else shard


def _sampled_rows(parameter: Tensor, elements: int) -> slice:
    """Of this rank's rows those whose place in the whole tensor is a multiple of the distance."""
    rows = parameter.shape[0] if parameter.dim() else 1
    of_row = max(1, parameter.numel() // rows)
    distance = min(rows, max(1, math.ceil(parameter.numel() / elements)))
    return slice(-(first_element(parameter) // of_row) % distance, None, distance)


def _squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).square()
