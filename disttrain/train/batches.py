"""The global batch over a run that may have been resumed with another batch or on another number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from disttrain.config import RunConfig
from disttrain.config.layout import check_batches
from disttrain.errors import UserError
from disttrain.parallel import is_blind
from disttrain.schedule import BatchSchedule, BatchStage, constant_batch


@dataclass(frozen=True)
class RunBatches:
    """`schedule` is what was from the start of the run and what will be; `ratio` what processes have made of the batch
    that the config names (`train.on_world_change = "scale_lr"`)."""

    schedule: BatchSchedule
    ratio: Fraction
    ranks: int

    def doubled(self, tokens: int) -> RunBatches:
        """From the position `tokens` on, at which a step begins."""
        larger = constant_batch(2 * self.schedule.samples_at(tokens), self.schedule.sequence_length)
        return RunBatches(self.schedule.continued(tokens, larger), self.ratio, self.ranks)

    def record(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        stages = [[stage.from_tokens, stage.samples] for stage in self.schedule.stages]
        return {"batches": {"stages": stages, "ratio": str(self.ratio), "ranks": self.ranks}}


def begin_batches(config: RunConfig, ranks: int) -> RunBatches:
    """Of a new run. Raises UserError where the batches do not divide over `ranks`, or could not follow the noise."""
    _check_auto(config, ranks)
    try:
        check_batches(config.train.batches(), ranks)
    except ValueError as error:
        raise UserError(str(error)) from error
    return RunBatches(config.train.batches(), Fraction(1), ranks)


def resume_batches(config: RunConfig, ranks: int, tokens: int, extra: dict[str, Any]) -> tuple[RunBatches, list[str]]:
    """From the position `tokens` of a checkpoint with `extra`, on `ranks` processes; and what to tell.

    Raises UserError where the config refuses another number of processes, or the batch does not divide over them.
    """
    kept = extra.get("batches")
    if kept is None:
        return begin_batches(config, ranks), []
    _check_auto(config, ranks)
    past = BatchSchedule(tuple(BatchStage(*stage) for stage in kept["stages"]), config.train.sequence_length)
    ratio, before, notes = Fraction(kept["ratio"]), int(kept["ranks"]), []
    if before != ranks:
        if config.train.on_world_change == "refuse":
            raise UserError(
                f"train.on_world_change = 'refuse': the checkpoint is of {before} processes, and there are {ranks}; "
                f"start {before}, or set it to 'keep_batch' or 'scale_lr'"
            )
        if config.train.on_world_change == "scale_lr":
            ratio *= Fraction(ranks, before)
    # Batches that the run found are known from its past alone.
    following = past.from_now(tokens) if config.train.batch_auto else config.train.batches()
    try:
        schedule = past.continued(tokens, following, ratio)
        check_batches(schedule.from_now(tokens), ranks)
    except ValueError as error:
        times = f" (the config's times {ratio}, for the run has had other numbers of processes)" if ratio != 1 else ""
        raise UserError(f"the global batch that the run would go on with{times}: {error}") from error
    old, new = (s.samples_at(tokens) * s.sequence_length for s in (past, schedule))
    if before != ranks:
        how = "stays at" if old == new else f"goes from {old:,} to"
        scaled = f", {ratio} times that of the config" if ratio != 1 else ""
        notes.append(f"{before} processes before, {ranks} now: the global batch {how} {new:,} tokens{scaled}")
    elif old != new:
        notes.append(f"the global batch goes from {old:,} to {new:,} tokens")
    return RunBatches(schedule, ratio, ranks), notes


def _check_auto(config: RunConfig, ranks: int) -> None:
    """Whether the noise scale can be measured at all, where the batch is to follow it."""
    auto = config.train.batch_auto
    if auto is None:
        return
    if is_blind(config.parallel, config.dims(ranks)):
        raise UserError("train.batch_auto: hsdp with parallel.dp_shard = 1 shows no noise scale; use ddp")
    if ranks == 1 and auto.start_tokens // config.train.sequence_length <= config.train.microbatch_size:
        raise UserError(
            "train.batch_auto: one process with one microbatch shows no noise scale; lower train.microbatch_size below "
            f"the {auto.start_tokens // config.train.sequence_length} sequences of the first batch"
        )
