"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from disttrain.config.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from disttrain.schedule import Shape

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW in two groups: matrices are decayed; embeddings, norms and biases are not."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate; the schedule multiplies it."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it. 0 switches clipping off."""


class ScheduleConfig(Section):
    """Linear warm-up, then `shape` down to `final_ratio` of the peak."""

    shape: Shape = "cosine"
    warmup_steps: NonNegativeInt = 100
    final_ratio: Fraction = 0.1
    horizon_steps: PositiveInt | None = None
    """Where the decay ends. Default: the end of the run. Set it when a run will be continued beyond its end."""
