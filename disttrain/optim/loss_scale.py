"""Dynamic loss scaling for fp16: a scale that every rank holds and changes alike, without asking the device."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
MINIMUM_SCALE = 1.0
GROWTH_STEPS = 2000
"""Good steps in a row after which the scale doubles; a step that overflowed halves it (arXiv 1710.03740)."""

UNUSED = -1.0
"""Stands for the good steps of a run without loss scaling, whose scale is not worth keeping."""


def loss_scale_update(scale: Tensor, good_steps: Tensor, overflow: Tensor) -> tuple[Tensor, Tensor]:
    """The next (scale, good_steps): scalars, fp32; `overflow` is 1 for a step with a gradient that is not finite."""
    bad = overflow > 0
    full = good_steps + 1 >= GROWTH_STEPS
    grown = torch.where(full, scale * 2, scale)
    next_scale = torch.where(bad, (scale / 2).clamp(min=MINIMUM_SCALE), grown)
    return next_scale, torch.where(bad | full, torch.zeros_like(good_steps), good_steps + 1)


class LossScale:
    """The scale and its history; without fp16 a constant one.

    Overflow needs no collective of its own: the gradient norm is made of all ranks' gradients and is not finite on
    every rank alike when one of them is not.
    """

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.scale = torch.ones((), device=device)
        self.good_steps = torch.zeros((), device=device)
        self._reset()

    def update(self, overflow: Tensor) -> None:
        if self.enabled:
            scale, good_steps = loss_scale_update(self.scale, self.good_steps, overflow)
            self.scale.copy_(scale)
            self.good_steps.copy_(good_steps)

    def state(self) -> dict[str, Tensor]:
        """Written in place by a load; there in every run, so that a checkpoint fits any precision."""
        return {"loss_scale.scale": self.scale, "loss_scale.good_steps": self.good_steps}

    def loaded(self) -> None:
        """Call after a load: a checkpoint of a run without loss scaling carries no scale worth keeping."""
        if not self.enabled or float(self.good_steps) == UNUSED:
            self._reset()

    def _reset(self) -> None:
        self.scale.fill_(INITIAL_SCALE if self.enabled else 1.0)
        self.good_steps.fill_(0.0 if self.enabled else UNUSED)
