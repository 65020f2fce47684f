"""How long, how much at once, and on how many processes."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from disttrain.config.base import PositiveFloat, PositiveInt, Section
from disttrain.schedule import BatchSchedule, constant_batch, doubling_ramp, linear_ramp


class RunSection(Section):
    """Where the run lives and what to do when it is already there."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Default: the name of the config file."""
    dir: str | None = None
    """The run folder. Default: runs/NAME."""
    resume: Literal["auto", "never", "must"] = "auto"


class BatchRamp(Section):
    """A batch that grows to `global_batch_tokens`: linearly in tokens, or by doubling."""

    start_tokens: PositiveInt
    """The first batch."""
    over_tokens: PositiveInt | None = None
    """Tokens until the last batch is reached, in a straight line (as GPT-3's)."""
    increment_tokens: PositiveInt | None = None
    """How much the batch grows at once on that line. Default: by `start_tokens`."""
    double_at_tokens: Annotated[tuple[PositiveInt, ...], Field(strict=False)] | None = None
    """Positions at which the batch doubles, in place of the line."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.over_tokens is None) == (self.double_at_tokens is None):
            raise ValueError("set one of over_tokens (a straight line) and double_at_tokens (doublings)")
        if self.increment_tokens is not None and self.over_tokens is None:
            raise ValueError("increment_tokens is for the straight line of over_tokens; doublings have none")
        at = list(self.double_at_tokens or ())
        if at != sorted(set(at)):
            raise ValueError(f"double_at_tokens = {at} goes backwards; give positions that rise")
        return self


class BatchAuto(Section):
    """A batch that doubles, up to `global_batch_tokens`, once the gradient noise scale allows it."""

    start_tokens: PositiveInt
    """The first batch."""
    every_steps: PositiveInt = 100
    """Steps between decisions; the averages begin to follow within some measurements of `monitor.noise_scale_every`."""
    ratio: PositiveFloat = 2.0
    """The batch doubles when the noise scale is at least this many times the batch."""


class TrainConfig(Section):
    """A step is an optimizer step; `global_batch_tokens` says how many tokens it sees, on any number of processes."""

    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    """The run's length in tokens, in place of `steps` (rounded up to whole steps)."""
    global_batch_tokens: PositiveInt = 4096
    batch_ramp: BatchRamp | None = None
    """How the batch comes to be `global_batch_tokens`. Default: it is so from the start."""
    batch_auto: BatchAuto | None = None
    """Let the run find its batches, in place of a ramp. Needs `tokens`: steps would not say how long the run is."""
    on_world_change: Literal["keep_batch", "scale_lr", "refuse"] = "keep_batch"
    """When a run resumes on another number of processes: keep the batch and accumulate more or less; let the batch grow
    with the processes and hyperparameters follow `schedule.batch_lr_rule`; or refuse."""
    microbatch_size: PositiveInt = 4
    """Sequences that one process computes at once, at most."""
    sequence_length: PositiveInt = 256
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init_from: str | None = None
    """A run folder, or one checkpoint in it, whose weights a new run begins with. Nothing else is taken over."""
    nproc: PositiveInt | None = None
    """Processes that `disttrain train` starts on this machine. Default: one per GPU, or one."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("set exactly one of steps and tokens: how long the run is")
        return self

    @model_validator(mode="after")
    def _batches(self) -> Self:
        for key, tokens in self._sizes().items():
            if rest := tokens % self.sequence_length:
                below = tokens - rest
                nearest = f"{below} or {below + self.sequence_length}" if below else str(self.sequence_length)
                length = self.sequence_length
                raise ValueError(
                    f"{key} = {tokens} is not a multiple of sequence_length = {length}; nearest: {nearest}"
                )
        self.batches()
        return self

    @model_validator(mode="after")
    def _auto(self) -> Self:
        auto, final = self.batch_auto, self.global_batch_tokens
        if auto is None:
            return self
        if self.batch_ramp is not None:
            raise ValueError("batch_ramp and batch_auto both say how the batch grows; leave one out")
        if self.tokens is None:
            raise ValueError("batch_auto: set tokens in place of steps, which do not say how long such a run is")
        if self.on_world_change == "scale_lr":
            raise ValueError("batch_auto finds its batches itself; on_world_change = 'scale_lr' would scale them")
        if auto.start_tokens > final:
            raise ValueError(
                f"batch_auto.start_tokens = {auto.start_tokens} is above global_batch_tokens = {final}: the batch "
                "grows; lower it, or raise the other"
            )
        doublings = math.log2(final / auto.start_tokens)
        if doublings != round(doublings):
            raise ValueError(
                f"batch_auto.start_tokens = {auto.start_tokens} doubled some times must be global_batch_tokens = "
                f"{final}; nearest global_batch_tokens: {auto.start_tokens * 2 ** round(doublings)}"
            )
        return self

    def _sizes(self) -> dict[str, int]:
        ramp = self.batch_ramp
        sizes = {"global_batch_tokens": self.global_batch_tokens}
        if self.batch_auto is not None:
            sizes["batch_auto.start_tokens"] = self.batch_auto.start_tokens
        if ramp is not None:
            sizes["batch_ramp.start_tokens"] = ramp.start_tokens
            sizes["batch_ramp.increment_tokens"] = ramp.increment_tokens or ramp.start_tokens
        return sizes

    def batches(self) -> BatchSchedule:
        """The global batch over the run, as far as it is known; ValueError for a ramp that does not lead to it."""
        length, ramp = self.sequence_length, self.batch_ramp
        final = self.global_batch_tokens // length
        if self.batch_auto is not None:
            return constant_batch(self.batch_auto.start_tokens // length, length)
        if ramp is None:
            return constant_batch(final, length)
        start = ramp.start_tokens // length
        if ramp.over_tokens is None:
            return doubling_ramp(start, final, ramp.double_at_tokens or (), length)
        increment = (ramp.increment_tokens or ramp.start_tokens) // length
        return linear_ramp(start, final, ramp.over_tokens, increment, length)

    @property
    def total_steps(self) -> int:
        return self.batches().steps_of(self.steps, self.tokens)


class CheckpointConfig(Section):
    every: PositiveInt = 500
    """Steps between checkpoints; the last step always gets one."""
    keep_last: PositiveInt = 2
    """The newest checkpoints, which stay."""
    keep_every: PositiveInt | None = None
    """Checkpoints of every so many steps stay for good."""
    asynchronous: bool = True
    """Write beside the training, which stands still only for a copy to host memory (as large as what a rank holds)."""
    on_error: Literal["continue", "stop"] = "continue"
    """What a save does that fails (a full disk, say): say so and try again soon, or end the run."""
