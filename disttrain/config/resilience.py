"""How a run looks after itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from disttrain.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class AnomalyConfig(Section):
    """What happens to a step whose loss or gradient is not finite, or far above what the run has seen lately."""

    spikes: bool = True
    """Spikes are left out too, not only what is not finite."""
    spike_deviations: PositiveFloat = 6.0
    """A spike is a loss, or a gradient norm's logarithm, so many standard deviations above the mean of the window."""
    window_steps: Annotated[int, Field(ge=8)] = 128
    """Accepted steps that a step is compared with."""
    warmup_steps: PositiveInt = 32
    """Accepted steps before spikes are looked for; what is not finite is skipped from the first step on."""
    max_skips: NonNegativeInt = 4
    """Steps in a row that are left out; the next bad one rolls back to the last good checkpoint."""
    max_rollbacks: NonNegativeInt = 2
    """Rollbacks of a run, each of which goes on behind the bad data; the next one would stop the run."""

    @model_validator(mode="after")
    def _check_warmup(self) -> AnomalyConfig:
        if self.spikes and self.warmup_steps > self.window_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} is more than the window has ({self.window_steps}): no spike would "
                "ever be seen; lower it, or set spikes = false"
            )
        return self


class ResilienceConfig(Section):
    collective_timeout_seconds: Annotated[float, Field(gt=0, le=7 * 86_400)] = 600.0
    """How long a process waits for its peers inside one collective before it gives up."""
    arrival_timeout_seconds: Annotated[float, Field(gt=0, le=7 * 86_400)] = 600.0
    """How long ranks wait at the start for those that have not come, before they name them and end."""
    max_restarts: NonNegativeInt = 3
    """How often `disttrain train` starts ranks again that died or hung, without a new checkpoint in between."""
    hang_seconds: PositiveFloat = 300.0
    """A rank that stays in one step for longer is taken to hang: all ranks write down where they are, and end. The
    first step, evaluation and saving have `collective_timeout_seconds`."""
    slow_rank_factor: Annotated[float, Field(gt=1)] = 1.1
    """A rank whose own work in a step takes so many times as long as the others' is named."""
    compare_replicas_every: NonNegativeInt = 100
    """Steps after which ranks that hold the same weights compare them, as before every checkpoint; 0 never does."""
    stop_before_limit_seconds: PositiveFloat = 120.0
    """How long before the end of its Slurm job a run stops with a checkpoint."""
    anomaly: AnomalyConfig = Field(default_factory=AnomalyConfig)
