"""Learning-rate factors: pure functions of how many tokens the run has seen, so a changed batch does not bend them."""

from __future__ import annotations

import math
from typing import Literal, get_args

Shape = Literal["cosine", "linear", "wsd", "constant"]
SHAPES: tuple[str, ...] = get_args(Shape)

WSD_DECAY_SHARE = 0.2
"""Share of the horizon that warm-up-stable-decay spends decaying (arXiv 2404.06395 uses 0.1 to 0.2)."""


def lr_factor(shape: Shape, position_tokens: int, warmup_tokens: int, horizon_tokens: int, final_ratio: float) -> float:
    """The factor in [0, 1] on the peak learning rate for the step that ends at `position_tokens`.

    The warm-up is linear from zero (not included) to one; the decay runs from its end to `horizon_tokens` and stays at
    `final_ratio` afterwards. A horizon that is not beyond the warm-up means that there is no decay.
    """
    if position_tokens < warmup_tokens:
        return position_tokens / warmup_tokens
    if shape == "constant" or horizon_tokens <= warmup_tokens:
        return 1.0
    progress = min(1.0, (position_tokens - warmup_tokens) / (horizon_tokens - warmup_tokens))
    return final_ratio + (1.0 - final_ratio) * _remaining(shape, progress)


def _remaining(shape: Shape, progress: float) -> float:
    """How much of the way between peak and final value is left, for `progress` in [0, 1]."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "linear":
        return 1.0 - progress
    return min(1.0, (1.0 - progress) / WSD_DECAY_SHARE)
