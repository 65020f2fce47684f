"""How long, how much at once, and on how many processes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from disttrain.config.base import NonNegativeInt, PositiveInt, Section


class RunSection(Section):
    """Where the run lives and what to do when it is already there."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Default: the name of the config file."""
    dir: str | None = None
    """The run folder. Default: runs/NAME."""
    resume: Literal["auto", "never", "must"] = "auto"


class TrainConfig(Section):
    """A step is an optimizer step; `global_batch_tokens` says how many tokens it sees, on any number of processes."""

    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    """The run's length in tokens, in place of `steps` (rounded up to whole steps)."""
    global_batch_tokens: PositiveInt = 4096
    microbatch_size: PositiveInt = 4
    """Sequences that one process computes at once."""
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

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else -(-(self.tokens or 0) // self.global_batch_tokens)


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


class MonitorConfig(Section):
    log_every: PositiveInt = 10
    evaluate_every: PositiveInt = 250
    """Steps between evaluations; the last step always gets one."""
    evaluate_tokens: PositiveInt = 65_536
    bigram_baseline: bool = False
    """Print, at the end, what an add-k bigram model of the same training tokens would reach on the same validation."""
    sample_prompt: str = "\n"
    sample_tokens: NonNegativeInt = 128
    """Tokens of text generated at the end of the run; 0 for none."""


class ResilienceConfig(Section):
    collective_timeout_seconds: Annotated[float, Field(gt=0, le=7 * 86_400)] = 600.0
    """How long a process waits for its peers inside one collective before it gives up."""
