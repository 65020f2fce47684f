"""torch's DistributedDataParallel, summing."""

# No `from __future__ import annotations` here: DDP checks the hook's annotations as objects.
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel


def apply_ddp(model: nn.Module, mesh: DeviceMesh) -> DistributedDataParallel:
    """Replicate `model` over the axis dp_replicate of `mesh`; gradients are summed, not averaged.

    The ranks' parameters must already be equal (`init_parameters` draws the same everywhere), so nothing is broadcast.
    """
    group = mesh["dp_replicate"].get_group()
    replicated = DistributedDataParallel(model, process_group=group, init_sync=False, gradient_as_bucket_view=True)
    replicated.register_comm_hook(group, _sum_bucket)
    return replicated


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The loss already carries one over the global token count: DDP's own average would divide twice."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda reduced: reduced.value()[0])
