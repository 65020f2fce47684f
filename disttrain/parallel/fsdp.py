"""torch's FSDP2, summing: zero1, zero2, fsdp and hsdp are settings of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from disttrain.config.parallel import ParallelConfig
from disttrain.models import ShardingPlan
from disttrain.parallel.fsdp_collectives import set_collectives
from disttrain.parallel.grad_sync import SyncRules
from disttrain.parallel.noise_probe import NoiseProbe
from disttrain.parallel.precision import DTYPES


def apply_fsdp(
    model: nn.Module, mesh: DeviceMesh, plan: ShardingPlan, config: ParallelConfig, probe: NoiseProbe | None = None
) -> None:
    """Cut all parameters of `model` along dim 0 over the axis dp_shard of `mesh`, replicated over dp_replicate.

    Gradients are summed, never averaged. Each unit of the plan is gathered on its own; what is left is the root unit.
    `probe` sees the gradients of each rank before they are summed.
    """
    axes = mesh["dp_replicate", "dp_shard"] if config.strategy == "hsdp" else mesh["dp_shard"]
    # Inputs are left alone: a cast would round the rotary angles, and activations have the right type already.
    precision = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.param_dtype], reduce_dtype=reduce_dtype(config), cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.cpu_offload else OffloadPolicy()
    reshard = SyncRules.of(config).reshard_after_forward
    for block in plan.units(model):
        fully_shard(block, mesh=axes, reshard_after_forward=reshard, mp_policy=precision, offload_policy=offload)
    # The backward begins with the root's weights: freed after the forward, they would be gathered again at once.
    fully_shard(model, mesh=axes, reshard_after_forward=False, mp_policy=precision, offload_policy=offload)
    sum_gradients(model, mesh, probe, late=_nobody_looks(model, config))


def sum_gradients(model: nn.Module, mesh: DeviceMesh, probe: NoiseProbe | None = None, late: bool = False) -> None:
    """The loss already carries one over the global token count: FSDP2's own average would divide twice.

    `late`: on gloo sums may be there only when the backward has ended.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    set_collectives(units, on_gloo=mesh.device_type == "cpu", probe=probe, late=late)


def _nobody_looks(model: nn.Module, config: ParallelConfig) -> bool:
    """At sums of gradients before the backward has ended: none to add them to, no replicas, no other type."""
    once = config.strategy != "hsdp" and not SyncRules.of(config).reduce_each
    dtype = reduce_dtype(config)
    return once and all(dtype in (None, parameter.dtype) for parameter in model.parameters())


def reduce_dtype(config: ParallelConfig) -> torch.dtype | None:
    """FSDP2 reduces in the computing type unless told otherwise; without mixed precision there is nothing to tell."""
    if config.param_dtype == "fp32":
        return None
    return DTYPES[config.reduce_dtype] or torch.float32
