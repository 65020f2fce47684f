"""The one fixed order in which techniques are applied."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from disttrain.config.parallel import ParallelConfig
from disttrain.models import ShardingPlan
from disttrain.parallel.activation_checkpointing import apply_activation_checkpointing
from disttrain.parallel.compile import apply_compile
from disttrain.parallel.ddp import apply_ddp
from disttrain.parallel.fsdp import apply_fsdp
from disttrain.parallel.noise_probe import NoiseProbe
from disttrain.parallel.precision import DTYPES, CastParameters


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    config: ParallelConfig,
    plan: ShardingPlan,
    materialise: Callable[[nn.Module], None],
    probe: NoiseProbe | None = None,
) -> nn.Module:
    """The module to train: `model` (on the meta device) with the techniques of `config`, over `mesh`.

    `materialise` gives the parameters storage and values once they are cut, so that no rank holds the whole model
    where the strategy spares it that. `probe` sees the gradients of each rank before they are summed.
    """
    prepare_blocks(model, config, plan)
    if config.shards:
        apply_fsdp(model, mesh, plan, config, probe)
    materialise(model)
    if config.shards:
        return model
    dtype = DTYPES[config.param_dtype]
    return apply_ddp(CastParameters(model, dtype) if dtype else model, mesh, DTYPES[config.reduce_dtype], probe)


def prepare_blocks(model: nn.Module, config: ParallelConfig, plan: ShardingPlan) -> None:
    """The first part of that order, which is the same whoever replicates or shards."""
    blocks = list(plan.units(model))
    apply_activation_checkpointing(blocks, config.activation_checkpointing, config.activation_checkpointing_every or 2)
    if config.compile:
        apply_compile(blocks)
