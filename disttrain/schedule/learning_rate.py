"""Learning-rate factors: pure functions of how many tokens the run has seen, so a changed batch does not bend them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"]
SHAPES: tuple[str, ...] = get_args(Shape)
Cooldown = Literal["linear", "sqrt"]

COOLDOWN_SHARE = 0.2
"""Share of the horizon that warm-up-stable-decay spends decaying (arXiv 2404.06395 uses 0.1 to 0.2)."""


@dataclass(frozen=True)
class LrSchedule:
    """Linear warm-up, then `shape` down to `final_ratio` of the peak at the horizon, and on from there.

    Lengths are in tokens. A horizon that is not beyond the warm-up means that there is no decay.
    """

    shape: Shape
    warmup_tokens: int
    horizon_tokens: int
    final_ratio: float
    cooldown_tokens: int | None = None
    """Of wsd, whose decay ends at the horizon. Default: `COOLDOWN_SHARE` of what follows the warm-up."""
    cooldown: Cooldown = "linear"
    """Of wsd: in a straight line, or as 1 - sqrt(progress) (arXiv 2405.18392)."""

    def factor(self, position_tokens: int) -> float:
        """In [0, 1], on the peak rate, for the step that ends at `position_tokens`."""
        if position_tokens < self.warmup_tokens:
            return position_tokens / self.warmup_tokens
        decay_tokens = self.horizon_tokens - self.warmup_tokens
        if self.shape == "constant" or decay_tokens <= 0:
            return 1.0
        if self.shape == "inverse_sqrt":
            return max(self.final_ratio, math.sqrt(self.warmup_tokens / max(position_tokens, 1)))
        progress = min(1.0, (position_tokens - self.warmup_tokens) / decay_tokens)
        return self.final_ratio + (1.0 - self.final_ratio) * self._remaining(progress, decay_tokens)

    def _remaining(self, progress: float, decay_tokens: int) -> float:
        """How much of the way between peak and final value is left, for `progress` in [0, 1]."""
        if self.shape == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.shape == "linear":
            return 1.0 - progress
        share = COOLDOWN_SHARE if self.cooldown_tokens is None else min(1.0, self.cooldown_tokens / decay_tokens)
        cooled = max(0.0, 1.0 - (1.0 - progress) / share) if share else float(progress >= 1.0)
        return 1.0 - (math.sqrt(cooled) if self.cooldown == "sqrt" else cooled)
