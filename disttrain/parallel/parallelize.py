"""The one fixed order in which techniques are applied."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from disttrain.models import ShardingPlan
from disttrain.parallel.ddp import apply_ddp
from disttrain.parallel.fsdp import apply_fsdp


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    strategy: str,
    plan: ShardingPlan,
    materialise: Callable[[nn.Module], None],
) -> nn.Module:
    """The module to train: `model` (on the meta device) cut for `strategy` over `mesh`.

    `materialise` gives the parameters storage and values once they are cut, so that no rank holds the whole model
    where the strategy spares it that.
    """
    if strategy == "fsdp":
        apply_fsdp(model, mesh, plan)
    materialise(model)
    return apply_ddp(model, mesh) if strategy == "ddp" else model
