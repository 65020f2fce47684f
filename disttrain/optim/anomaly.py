"""Steps that must not be taken: decided on the device, from numbers that all ranks have, alike on all of them."""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from disttrain.config.resilience import AnomalyConfig

_LOSS_FLOOR, _NORM_FLOOR = 0.05, 0.25
"""The least deviation that counts: of the loss as a share of its mean, of a norm's logarithm. A calm history must not
make every ripple a spike."""


class Verdict(IntEnum):
    """What is wrong with a step; the first that holds."""

    GOOD = 0
    GRADIENT_NOT_FINITE = 1
    LOSS_NOT_FINITE = 2
    GRADIENT_SPIKE = 3
    LOSS_SPIKE = 4


class AnomalyJudge:
    """Compares a step's loss and gradient norm with those of the last accepted steps.

    A spike lies more than `config.spike_deviations` standard deviations above the mean of the window: of the loss
    itself, of the norm its logarithm. Only accepted steps enter the window, which is part of a checkpoint, so that a
    resumed run decides alike.
    """

    def __init__(self, config: AnomalyConfig, device: torch.device) -> None:
        self.config = config
        shape = (2, config.window_steps)
        self.history = torch.full(shape, math.nan, dtype=torch.float64, device=device)
        """[2, window] loss and logarithm of the norm, the newest last; NaN where nothing was accepted yet."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """The `Verdict` on scalars `loss` and `norm`, fp64; a good step enters the history. Waits for nothing."""
        # A batch without any valid token has no gradient: NaN, which is nothing to compare with.
        seen = torch.stack([loss, torch.where(norm > 0, norm, torch.nan).log()])
        verdict = torch.full((), Verdict.GOOD, dtype=torch.int64, device=self.history.device)
        if self.config.spikes:
            spike = self._spikes(seen)
            verdict = torch.where(spike[0], Verdict.LOSS_SPIKE, verdict)
            verdict = torch.where(spike[1], Verdict.GRADIENT_SPIKE, verdict)
        verdict = torch.where(loss.isfinite(), verdict, Verdict.LOSS_NOT_FINITE)
        verdict = torch.where(norm.isfinite(), verdict, Verdict.GRADIENT_NOT_FINITE)
        longer = torch.cat([self.history[:, 1:], seen[:, None]], dim=1)
        self.history.copy_(torch.where(verdict == Verdict.GOOD, longer, self.history))
        return verdict

    def state(self) -> dict[str, Tensor]:
        return {"service.anomaly.history": self.history}

    def _spikes(self, seen: Tensor) -> Tensor:
        """[2] booleans."""
        known = self.history.isfinite()
        count = known.sum(1)
        mean = self.history.nansum(1) / count.clamp_min(1)
        spread = torch.where(known, self.history - mean[:, None], 0.0).square().sum(1) / (count - 1).clamp_min(1)
        floor = torch.stack([_LOSS_FLOOR * mean[0].abs(), torch.full_like(mean[1], _NORM_FLOOR)])
        limit = mean + self.config.spike_deviations * torch.maximum(spread.sqrt(), floor)
        return (count >= self.config.warmup_steps) & (seen > limit)


def finite_verdict(norm: Tensor) -> Tensor:
    """Where nobody judges: whether the gradients' `norm` is finite."""
    return torch.where(norm.isfinite(), Verdict.GOOD, Verdict.GRADIENT_NOT_FINITE)
