"""The whole configuration of a run: one frozen section per concern."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from disttrain.config.base import Section
from disttrain.config.data import DataConfig
from disttrain.config.groups import ScheduleFreeAdamW
from disttrain.config.layout import BatchPlan, ParallelDims
from disttrain.config.model import ModelConfig
from disttrain.config.optim import OptimConfig, ScheduleConfig
from disttrain.config.parallel import ParallelConfig
from disttrain.config.train import (
    CheckpointConfig,
    MonitorConfig,
    ResilienceConfig,
    RunSection,
    TrainConfig,
)
from disttrain.schedule import Shape


class RunConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA when torch can use one, else the CPU; a GPU that torch cannot use is an error, not a CPU run."""
    run: RunSection = Field(default_factory=RunSection)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    resilience: ResilienceConfig = Field(default_factory=ResilienceConfig)

    @property
    def schedule_shape(self) -> Shape:
        """The shape that was asked for, else the one that suits the algorithms."""
        return self.schedule.shape or ("constant" if _schedule_free(self.optim) else "cosine")

    @model_validator(mode="after")
    def _check_schedule(self) -> RunConfig:
        shape = self.schedule.shape
        if shape not in (None, "constant") and (names := _schedule_free(self.optim)):
            raise ValueError(
                f"schedule.shape = {shape!r}: {', '.join(names)} averages in place of a decay; leave the shape out, or "
                f"set it to 'constant'"
            )
        return self

    @model_validator(mode="after")
    def _check_qk_clip(self) -> RunConfig:
        qk_clip, length = self.optim.resolved_qk_clip, self.train.sequence_length
        if qk_clip.mode != "clip":
            return self
        by_bound = qk_clip.logits == "bound" or (qk_clip.logits == "auto" and self.device != "cuda")
        if by_bound and qk_clip.threshold <= math.log(length):
            raise ValueError(
                f"optim.qk_clip.threshold = {qk_clip.threshold}: a head that looks at all {length} keys alike has the "
                f"bound log(train.sequence_length) = {math.log(length):.2f} and would shrink for ever; raise the "
                "threshold, or set optim.qk_clip.logits = 'exact'"
            )
        if self.model.qk_norm:
            raise ValueError(
                "optim.qk_clip: model.qk_norm = true normalises queries and keys after their weights, which undoes "
                "any scaling of these and bounds the logits already; leave one of the two out, or set "
                "optim.qk_clip.mode = 'log'"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir).expanduser() if self.run.dir else Path("runs") / self.run.name

    def dims(self, world: int) -> ParallelDims:
        """The mesh for `world` processes; ValueError if it does not multiply."""
        return ParallelDims.resolve(self.parallel.strategy, self.parallel.dp_replicate, self.parallel.dp_shard, world)

    def batch_plan(self, world: int) -> BatchPlan:
        """How a global batch is cut over `world` processes; ValueError if it does not divide."""
        train = self.train
        ranks = self.dims(world).batch
        return BatchPlan.resolve(train.global_batch_tokens, train.sequence_length, train.microbatch_size, ranks)

    def with_vocab_size(self, vocab_size: int) -> RunConfig:
        """A copy whose model knows its vocabulary."""
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": vocab_size})})


def _schedule_free(optim: OptimConfig) -> list[str]:
    """The groups that need no decay of the rate."""
    return [f"group {group.name}" for group in optim.resolved_groups if isinstance(group, ScheduleFreeAdamW)]
