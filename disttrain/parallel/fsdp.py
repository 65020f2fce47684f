"""torch's FSDP2, summing, one unit per pattern of the model's plan."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from disttrain.models import ShardingPlan


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, plan: ShardingPlan) -> None:
    """Cut all parameters along dim 0 over the axis dp_shard of `mesh`; gradients are summed, never averaged."""
    shard = mesh["dp_shard"]
    for unit in plan.units(model):
        fully_shard(unit, mesh=shard, reshard_after_forward=True)
    # Said for the root too: its default keeps gathered weights after a forward, which later writes do not reach.
    fully_shard(model, mesh=shard, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
