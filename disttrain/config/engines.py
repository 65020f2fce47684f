"""Who runs the step: our own engine, DeepSpeed or Accelerate, and what does not go together with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import model_validator

from disttrain.config.base import Section
from disttrain.config.clipping import AGC
from disttrain.config.groups import Adafactor
from disttrain.config.matrix_groups import MatrixGroup
from disttrain.config.optim import OptimConfig
from disttrain.config.parallel import ParallelConfig

Engine = Literal["native", "deepspeed", "accelerate"]
STAGES = {"ddp": 0, "zero1": 1, "zero2": 2, "fsdp": 3}
"""DeepSpeed's stage for each strategy."""
Place = Literal["none", "cpu", "nvme"]


class DeepSpeedConfig(Section):
    """docs/engines.md says what becomes of the other sections."""

    stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO's stage; the same as parallel.strategy ddp, zero1, zero2, fsdp, of which one is enough."""
    offload_optimizer: Place = "none"
    """Where the optimizer works and keeps its state and the fp32 weights (stages 1 to 3)."""
    offload_parameters: Place = "none"
    """Where parameters wait until they are gathered (stage 3)."""
    nvme_path: str | None = None
    """A folder on a fast disk of each machine, for `offload_parameters = "nvme"`."""
    config_file: str | None = None
    """A ds_config.json for what has no setting here; what it says of the rest must agree."""

    @model_validator(mode="after")
    def _places(self) -> Self:
        if self.offload_optimizer == "nvme":
            raise ValueError(
                "offload_optimizer = 'nvme': DeepSpeed then has weights, gradients and state of one part of the "
                "parameters in memory at a time, and clipping and safeguards here look at all gradients before any "
                "update; the nearest is 'cpu'"
            )
        on_disk = self.offload_parameters == "nvme"
        if on_disk and self.offload_optimizer != "cpu":
            raise ValueError(
                "offload_parameters = 'nvme': the weights go to the disk from the host memory that the optimizer works "
                "in; set deepspeed.offload_optimizer = 'cpu'"
            )
        if on_disk and self.nvme_path is None:
            raise ValueError(
                "offload_parameters = 'nvme': nobody says where the disk is; set deepspeed.nvme_path to a folder on it"
            )
        if self.nvme_path is not None and not on_disk:
            raise ValueError(
                f"nvme_path = {self.nvme_path!r}: nothing goes to a disk; set deepspeed.offload_parameters = 'nvme', "
                "or leave it out"
            )
        return self


def engine_problems(
    engine: Engine, section: DeepSpeedConfig, parallel: ParallelConfig, optim: OptimConfig, batch_follows_noise: bool
) -> Iterator[str]:
    """What an engine cannot do, each with its reason and the nearest that it can."""
    if engine == "deepspeed":
        yield from _deepspeed_layout(section, parallel)
        yield from _flat_optimizers(STAGES.get(parallel.strategy, 0), optim)
        if batch_follows_noise:
            yield (
                "train.batch_auto: DeepSpeed reduces gradients before anybody sees them, so the noise scale that the "
                "batch would follow is not measured; use train.batch_ramp, or engine = 'native'"
            )
        return
    plain = DeepSpeedConfig()
    for name in DeepSpeedConfig.model_fields:
        if getattr(section, name) != getattr(plain, name):
            yield f"deepspeed.{name}: the engine is {engine!r}; set engine = 'deepspeed', or leave it out"
    if engine == "accelerate" and parallel.strategy not in ("ddp", "fsdp"):
        yield (
            f"parallel.strategy = {parallel.strategy!r}: Accelerate has DDP and FSDP2; use ddp or fsdp, or "
            "engine = 'native'"
        )


def _deepspeed_layout(section: DeepSpeedConfig, parallel: ParallelConfig) -> Iterator[str]:
    stage = STAGES.get(parallel.strategy)
    if stage is None:
        yield "parallel.strategy = 'hsdp': DeepSpeed's stages cut over all processes; the nearest is fsdp (stage 3)"
        return
    if section.stage not in (None, stage):
        yield (
            f"deepspeed.stage = {section.stage} and parallel.strategy = {parallel.strategy!r}, which is stage {stage}: "
            "make them agree, or leave one out"
        )
    if section.offload_optimizer != "none" and stage == 0:
        yield "deepspeed.offload_optimizer: stage 0 cuts nothing; use stage 1 (zero1) or above"
    if section.offload_parameters != "none" and stage != 3:
        yield f"deepspeed.offload_parameters: stage {stage} leaves parameters whole; use stage 3 (fsdp)"
    if parallel.cpu_offload:
        yield "parallel.cpu_offload is for the native engine: set deepspeed.offload_optimizer = 'cpu'"
    if parallel.reshard_after_forward is False:
        yield "parallel.reshard_after_forward = false: stage 3 frees gathered weights itself; the nearest is zero2"
    if parallel.grad_accumulation == "unsharded":
        yield (
            "parallel.grad_accumulation = 'unsharded': stage 3 reduces gradients after every microbatch; leave it out, "
            "or use zero1"
        )
    if parallel.compile and stage == 3:
        yield "parallel.compile: stage 3 gathers weights in hooks inside of blocks, which are no graph; use zero2"


def _flat_optimizers(stage: int, optim: OptimConfig) -> Iterator[str]:
    """Stages 1 to 3 leave an optimizer runs of elements."""
    if stage == 0:
        return
    flat = f"ZeRO stage {stage} cuts parameters into runs of elements that do not end with their rows"
    nearest = "use engine = 'native', or deepspeed.stage = 0 (ddp), which leaves parameters whole"
    for group in optim.resolved_groups:
        where, kept = f"optim: group {group.name}", getattr(group, "state_dtype", "parameter")
        if isinstance(group, MatrixGroup | Adafactor):
            yield f"{where}: {group.algorithm} needs whole rows or matrices, and {flat}; {nearest}"
        if isinstance(group.clip, AGC):
            yield f"{where}: clip agc works on rows, and {flat}; {nearest}, or clip by norm"
        if kept != "parameter":
            yield f"{where}: state_dtype = {kept!r} counts from rows, and {flat}; {nearest}, or leave it out"
    if optim.resolved_qk_clip.mode != "off":
        yield f"optim.qk_clip works on the rows of heads, and {flat}; {nearest}"
