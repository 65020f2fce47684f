"""The whole configuration of a run: one frozen section per concern."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from disttrain.config.base import Section
from disttrain.config.clipping import AdaptiveClip
from disttrain.config.data import DataConfig
from disttrain.config.engines import STAGES, DeepSpeedConfig, Engine, engine_problems
from disttrain.config.groups import Group, ScheduleFreeAdamW
from disttrain.config.layout import ParallelDims, check_batches
from disttrain.config.model import ModelConfig
from disttrain.config.monitor import MonitorConfig, ProfileConfig
from disttrain.config.optim import OptimConfig
from disttrain.config.parallel import ParallelConfig
from disttrain.config.resilience import ResilienceConfig
from disttrain.config.schedule import ScheduleConfig, lr_schedule
from disttrain.config.train import (
    CheckpointConfig,
    RunSection,
    TrainConfig,
)
from disttrain.schedule import BatchSchedule, LrSchedule, Shape


class RunConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA when torch can use one, else the CPU; a GPU that torch cannot use is an error, not a CPU run."""
    engine: Engine = "native"
    """Who runs the step: docs/engines.md says what each can do."""
    run: RunSection = Field(default_factory=RunSection)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    resilience: ResilienceConfig = Field(default_factory=ResilienceConfig)
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)

    @model_validator(mode="before")
    @classmethod
    def _strategy_of_the_stage(cls, table: Any) -> Any:
        """A ZeRO stage says the strategy too, where nothing else does."""
        if not isinstance(table, dict) or table.get("engine") != "deepspeed":
            return table
        section, parallel = table.get("deepspeed"), table.get("parallel", {})
        stage = section.get("stage") if isinstance(section, dict) else None
        strategies = [strategy for strategy, number in STAGES.items() if number == stage]
        if not strategies or not isinstance(parallel, dict) or "strategy" in parallel:
            return table
        return {**table, "parallel": {**parallel, "strategy": strategies[0]}}

    @model_validator(mode="after")
    def _check_engine(self) -> RunConfig:
        follows = self.train.batch_auto is not None
        if problems := list(engine_problems(self.engine, self.deepspeed, self.parallel, self.optim, follows)):
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> RunConfig:
        for group in self.optim.resolved_groups:
            shape = (group.schedule and group.schedule.shape) or self.schedule.shape
            if isinstance(group, ScheduleFreeAdamW) and shape not in (None, "constant"):
                raise ValueError(
                    f"schedule.shape = {shape!r}: group {group.name} averages in place of a decay; leave it out, "
                    "or set it to 'constant'"
                )
        for group, law in zip(self.optim.resolved_groups, self.lr_schedules(self.train.batches()), strict=True):
            if law.warmup_tokens > law.horizon_tokens:
                raise ValueError(
                    f"schedule: group {group.name} warms up for {law.warmup_tokens:,} tokens, and the "
                    f"run or its horizon ends at {law.horizon_tokens:,}; shorten it, or set schedule.horizon_steps"
                )
            if law.shape == "inverse_sqrt" and law.warmup_tokens == 0:
                raise ValueError(
                    f"schedule.shape = 'inverse_sqrt': group {group.name} has no warm-up, from whose end the rate "
                    "falls; set schedule.warmup_steps"
                )
        return self

    @model_validator(mode="after")
    def _check_rules(self) -> RunConfig:
        own = [g.name for g in self.optim.groups if g.schedule and g.schedule.batch_lr_rule not in (None, "none")]
        without_effect = [
            *(f"the batch_lr_rule of group {name}" for name in own),
            *(["keep_decay_timescale"] if self.schedule.keep_decay_timescale else []),
        ]
        if without_effect and self.schedule.base_batch_tokens is None:
            raise ValueError(
                f"schedule: {', '.join(without_effect)} needs schedule.base_batch_tokens: what batch the rates were "
                "tuned at"
            )
        return self

    @model_validator(mode="after")
    def _check_world_change(self) -> RunConfig:
        if self.train.on_world_change == "scale_lr" and self.schedule.base_batch_tokens is None:
            raise ValueError(
                "train.on_world_change = 'scale_lr' needs schedule.base_batch_tokens, the batch that the rates were "
                "tuned at"
            )
        if self.train.on_world_change == "scale_lr" and self.train.tokens is None:
            raise ValueError(
                "train.on_world_change = 'scale_lr': set train.tokens in place of steps, which do not say how long a "
                "run is whose batch changes"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_auto(self) -> RunConfig:
        if self.train.batch_auto is None:
            return self
        if not self.monitor.noise_scale_every:
            raise ValueError("train.batch_auto follows the noise scale: set monitor.noise_scale_every above 0")
        for group in self.optim.resolved_groups:
            if isinstance(group.clip, AdaptiveClip) and group.clip.tighten_until is None:
                raise ValueError(
                    "train.batch_auto: nobody knows how many steps the run has; set tighten_until of the adaptive "
                    f"clip of group {group.name}"
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

    def lr_schedules(self, batches: BatchSchedule) -> list[LrSchedule]:
        """One for each of the optimizer's groups, where the batch goes as `batches`."""
        steps = batches.steps_of(self.train.steps, self.train.tokens)
        return [
            lr_schedule(group.schedule, self.schedule, _default_shape(group), batches, steps)
            for group in self.optim.resolved_groups
        ]

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir).expanduser() if self.run.dir else Path("runs") / self.run.name

    def dims(self, world: int) -> ParallelDims:
        """The mesh for `world` processes; ValueError if it does not multiply."""
        return ParallelDims.resolve(self.parallel.strategy, self.parallel.dp_replicate, self.parallel.dp_shard, world)

    def check_batches(self, world: int) -> None:
        """ValueError where `world` processes do not multiply, or a global batch does not divide over them."""
        check_batches(self.train.batches(), self.dims(world).batch)

    def with_vocab_size(self, vocab_size: int) -> RunConfig:
        """A copy whose model knows its vocabulary."""
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": vocab_size})})


def _default_shape(group: Group) -> Shape:
    return "constant" if isinstance(group, ScheduleFreeAdamW) else "cosine"
