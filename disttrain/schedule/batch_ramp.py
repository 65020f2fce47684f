"""The size of the global batch as a pure function of the tokens consumed: the same on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class BatchStage:
    """From `from_tokens` on, every step takes `samples` samples."""

    from_tokens: int
    samples: int


@dataclass(frozen=True)
class BatchSchedule:
    """Stages in order, the first from 0; a step that begins within a stage has its batch, whole, to the end.

    So positions at which steps begin follow from the stages alone, and steps and tokens from each other.
    """

    stages: tuple[BatchStage, ...]
    sequence_length: int

    def __post_init__(self) -> None:
        starts = [stage.from_tokens for stage in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"stages must begin at 0 and go forward, not {starts}")
        if any(stage.samples <= 0 for stage in self.stages):
            raise ValueError("a batch has at least one sample")

    def samples_at(self, tokens: int) -> int:
        """Of the step that begins when `tokens` have been consumed."""
        return next(stage.samples for stage in reversed(self.stages) if stage.from_tokens <= tokens)

    def samples_before(self, tokens: int) -> int:
        """Of the step that ended when `tokens` had been consumed."""
        return self.samples_at(self.tokens_after(self.steps_for(tokens) - 1))

    def steps_of(self, steps: int | None, tokens: int | None) -> int:
        """A length that is given in either."""
        return steps if steps is not None else self.steps_for(tokens or 0)

    def tokens_after(self, steps: int) -> int:
        """Consumed by the first `steps` steps."""
        ends = [*self._entries[1:], None]
        for (first_step, first_tokens), stage, last in zip(self._entries, self.stages, ends, strict=True):
            if last is None or steps <= last[0]:
                return first_tokens + (steps - first_step) * stage.samples * self.sequence_length
        raise AssertionError("the last stage has no end")

    def steps_for(self, tokens: int) -> int:
        """The fewest steps that consume at least `tokens`."""
        ends = [*self._entries[1:], None]
        for (first_step, first_tokens), stage, last in zip(self._entries, self.stages, ends, strict=True):
            if last is None or tokens <= last[1]:
                return first_step + -(-(tokens - first_tokens) // (stage.samples * self.sequence_length))
        raise AssertionError("the last stage has no end")

    def continued(self, from_tokens: int, following: BatchSchedule, ratio: Fraction = Fraction(1)) -> BatchSchedule:
        """This schedule up to `from_tokens`, where a step begins, and from there what `following` says, `ratio` times.

        ValueError where that is no whole number of samples.
        """
        past = [stage for stage in self.stages if stage.from_tokens < from_tokens]
        now = BatchStage(from_tokens, following.samples_at(from_tokens))
        future = [now, *(stage for stage in following.stages if stage.from_tokens > from_tokens)]
        scaled = [BatchStage(stage.from_tokens, _scaled(stage.samples, ratio)) for stage in future]
        stages = [*past, *scaled]
        kept = [stages[0], *(stage for before, stage in pairwise(stages) if before.samples != stage.samples)]
        return BatchSchedule(tuple(kept), self.sequence_length)

    def from_now(self, tokens: int) -> BatchSchedule:
        """What is still to come at `tokens`, as if from a start."""
        later = [stage for stage in self.stages if stage.from_tokens > tokens]
        return BatchSchedule((BatchStage(0, self.samples_at(tokens)), *later), self.sequence_length)

    @cached_property
    def _entries(self) -> list[tuple[int, int]]:
        """The (step, tokens) at which each stage's first step begins."""
        entries = [(0, 0)]
        for stage, following in zip(self.stages, self.stages[1:], strict=False):
            step, tokens = entries[-1]
            size = stage.samples * self.sequence_length
            # A stage that a long step jumped over has no step of its own.
            count = max(0, -(-(following.from_tokens - tokens) // size))
            entries.append((step + count, tokens + count * size))
        return entries


def _scaled(samples: int, ratio: Fraction) -> int:
    scaled = samples * ratio
    if scaled.denominator != 1:
        raise ValueError(f"a batch of {samples} samples times {ratio} is no whole number of samples")
    return int(scaled)


def constant_batch(samples: int, sequence_length: int) -> BatchSchedule:
    return BatchSchedule((BatchStage(0, samples),), sequence_length)


def linear_ramp(start: int, final: int, over_tokens: int, increment: int, sequence_length: int) -> BatchSchedule:
    """From `start` to `final` samples, linearly in tokens over the first `over_tokens` (GPT-3, arXiv 2005.14165), in
    steps of `increment` samples; the last increment is what is left."""
    if not 0 < start <= final:
        raise ValueError(f"a ramp goes up: its first batch of {start} samples is not below the last of {final}")
    sizes = [*range(start, final, increment), final]
    share = [(size - start) / max(final - start, 1) for size in sizes]
    stages = [BatchStage(round(over_tokens * part), size) for part, size in zip(share, sizes, strict=True)]
    # The last full batch begins at the end of the ramp; increments that fall on one token are one stage.
    latest = {stage.from_tokens: stage for stage in stages}
    return BatchSchedule(tuple(latest.values()), sequence_length)


def doubling_ramp(start: int, final: int, at_tokens: Sequence[int], sequence_length: int) -> BatchSchedule:
    """`start` samples, twice as many from each of `at_tokens` on, which must end at `final` (arXiv 2505.23971)."""
    reached = start * 2 ** len(at_tokens)
    if reached != final:
        raise ValueError(
            f"{start} samples doubled {len(at_tokens)} times are {reached}, and the final batch has {final}: change "
            "one of the three"
        )
    stages = [BatchStage(0, start), *(BatchStage(t, start * 2 ** (i + 1)) for i, t in enumerate(at_tokens))]
    return BatchSchedule(tuple(stages), sequence_length)
