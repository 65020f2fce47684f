"""How rates go over a run, and how they follow the batch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from disttrain.config.base import Fraction, NonNegativeInt, PositiveInt, Section
from disttrain.schedule import BatchSchedule, Cooldown, LrSchedule, Rule, Shape

DEFAULT_WARMUP_STEPS = 100
DEFAULT_FINAL_RATIO = 0.1


class GroupSchedule(Section):
    """What a group has of its own; the rest is that of `[schedule]`. Lengths are in steps or in tokens."""

    shape: Shape | None = None
    warmup_steps: NonNegativeInt | None = None
    warmup_tokens: NonNegativeInt | None = None
    final_ratio: Fraction | None = None
    """The rate at the horizon and beyond, as a share of the peak; of inverse_sqrt the least."""
    horizon_steps: PositiveInt | None = None
    horizon_tokens: PositiveInt | None = None
    """Where the decay ends. Default: the end of the run. Set it when a run will be continued beyond its end."""
    cooldown_steps: NonNegativeInt | None = None
    cooldown_tokens: NonNegativeInt | None = None
    """Of wsd: how long before the horizon the decay begins. Default: a fifth of what follows the warm-up."""
    cooldown: Cooldown | None = None
    """Of wsd: linear, or sqrt for 1 - sqrt(progress)."""
    batch_lr_rule: Rule | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        for length in ("warmup", "horizon", "cooldown"):
            if getattr(self, f"{length}_steps") is not None and getattr(self, f"{length}_tokens") is not None:
                raise ValueError(f"set one of {length}_steps and {length}_tokens, not both")
        return self


class ScheduleConfig(GroupSchedule):
    """Linear warm-up, then `shape` down to `final_ratio` of the peak; and how hyperparameters follow the batch.

    `shape` is by default cosine, or constant for schedule-free algorithms, whose averaging takes the place of a decay.
    Warm-up: 100 steps, at most the run; final_ratio: 0.1.
    """

    batch_lr_rule: Rule | None = None
    """What Adam-like groups do when the batch is not `base_batch_tokens`: sqrt (lr), sqrt_full (lr, betas and eps),
    linear or none. SGD and its kin take linear in the place of either root. Default: sqrt where there is a base."""
    matrix_lr_rule: Literal["none", "linear", "sqrt"] = "sqrt"
    """The same for muon and other optimizers of whole matrices; there is practice for sqrt, no derivation."""
    base_batch_tokens: PositiveInt | None = None
    """The batch at which the rates were tuned."""
    keep_decay_timescale: bool = False
    """Scale decoupled weight decay too, so that batch / (lr weight_decay) tokens stay what they were."""

    @property
    def rule(self) -> Rule:
        return self.batch_lr_rule or ("sqrt" if self.base_batch_tokens else "none")

    @model_validator(mode="after")
    def _base(self) -> Self:
        if self.batch_lr_rule not in (None, "none") and self.base_batch_tokens is None:
            raise ValueError(
                f"batch_lr_rule = {self.batch_lr_rule!r} needs base_batch_tokens: what batch the rates were tuned at"
            )
        return self


def lr_schedule(
    own: GroupSchedule | None, shared: ScheduleConfig, shape: Shape, batches: BatchSchedule, total_steps: int
) -> LrSchedule:
    """A group's schedule in tokens: its own settings, else the shared ones, else the defaults (`shape`)."""
    sections = [section for section in (own, shared) if section is not None]

    def said(key: str, default: Any) -> Any:
        return next((value for s in sections if (value := getattr(s, key)) is not None), default)

    def length(name: str) -> tuple[int | None, int | None]:
        """In tokens or in steps, of the nearest section that says it in either."""
        pairs = ((getattr(s, f"{name}_tokens"), getattr(s, f"{name}_steps")) for s in sections)
        return next((pair for pair in pairs if pair != (None, None)), (None, None))

    def position(tokens: int | None, steps: int | None, default: int) -> int:
        if tokens is not None:
            return tokens
        return batches.tokens_after(default if steps is None else steps)

    horizon = position(*length("horizon"), default=total_steps)
    cooldown, cooldown_steps = length("cooldown")
    if cooldown_steps is not None:
        # Back from the horizon: steps at the end of a ramp are larger than those at its beginning.
        first = max(0, batches.steps_for(horizon) - cooldown_steps)
        cooldown = horizon - batches.tokens_after(first)
    warmup = position(*length("warmup"), default=DEFAULT_WARMUP_STEPS)
    return LrSchedule(
        shape=said("shape", shape),
        warmup_tokens=warmup if length("warmup") != (None, None) else min(horizon, warmup),
        horizon_tokens=horizon,
        final_ratio=said("final_ratio", DEFAULT_FINAL_RATIO),
        cooldown_tokens=cooldown,
        cooldown=said("cooldown", "linear"),
    )
