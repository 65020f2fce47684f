"""What a log row tells of each group of parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from disttrain.config.clipping import ClipNorm
from disttrain.optim import GradientNorms, OptimizerSet


class GroupMetrics:
    """Rates, norms and clipping by group; values stay on the device between log steps and are equal on all ranks."""

    _shares: Tensor | None
    _steps: int

    def __init__(self, optimizer: OptimizerSet) -> None:
        self.groups = optimizer.param_groups
        self._thresholds = self._limits()
        self.clear()

    def add(self, norms: GradientNorms) -> None:
        """One more step."""
        self._shares = norms.shares if self._shares is None else self._shares + norms.shares
        self._steps += 1

    def record(self, norms: GradientNorms) -> dict[str, float]:
        """`lr/GROUP`, `grad_norm/GROUP` (before clipping) and `clip_scale/GROUP` of this step; `clip_share/GROUP` since
        the last record: by norm the share of clipped steps, by value that of clipped elements, by agc that of rows, of
        adaptive clipping that of units. `lr` is the rate of the group with most elements."""
        largest = max(self.groups, key=lambda group: sum(p.numel() for p in group["params"]))
        shares = torch.zeros_like(norms.scales) if self._shares is None else self._shares / self._steps
        self.clear()
        rows = torch.stack([norms.groups, norms.scales, shares]).tolist()
        record = {"lr": largest["lr"]}
        for key, row in zip(("grad_norm", "clip_scale", "clip_share"), rows, strict=True):
            record |= {f"{key}/{group['name']}": value for group, value in zip(self.groups, row, strict=True)}
        return record | {f"lr/{group['name']}": group["lr"] for group in self.groups} | self._thresholds

    def clear(self) -> None:
        self._shares, self._steps = None, 0

    def _limits(self) -> dict[str, float]:
        """`clip_threshold`, of the norm of all groups, and `clip_threshold/GROUP`, where 2-norms are limited so."""
        found = {}
        for group in self.groups:
            if isinstance(clip := group["config"].clip, ClipNorm) and clip.order == 2:
                found["clip_threshold" if clip.over == "all" else f"clip_threshold/{group['name']}"] = clip.limit
        return found
