"""torch's DistributedDataParallel, summing."""

# No `from __future__ import annotations` here: DDP checks the hook's annotations as objects.
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from disttrain.parallel.noise_probe import NoiseProbe

BUCKET_MB = 25
"""torch's own default; said aloud it holds for the first bucket too, which otherwise has 1 MiB."""
Hook = Callable[[dist.ProcessGroup, dist.GradBucket], torch.futures.Future[Tensor]]


def apply_ddp(
    model: nn.Module, mesh: DeviceMesh, reduce_dtype: torch.dtype | None = None, probe: NoiseProbe | None = None
) -> DistributedDataParallel:
    """Replicate `model` over the axis dp_replicate of `mesh`; gradients are summed, not averaged, in `reduce_dtype`.

    The ranks' parameters must already be equal (`init_parameters` draws the same everywhere), so nothing is broadcast.
    """
    group = mesh["dp_replicate"].get_group()
    # torch's small first bucket starts a GPU's network early; gloo would only take the cores that compute once more.
    cap = BUCKET_MB if mesh.device_type == "cpu" else None
    replicated = DistributedDataParallel(
        model, process_group=group, init_sync=False, bucket_cap_mb=cap, gradient_as_bucket_view=True
    )
    sum_over_replicas(replicated, group, reduce_dtype, probe)
    return replicated


def sum_over_replicas(
    replicated: DistributedDataParallel,
    group: dist.ProcessGroup,
    reduce_dtype: torch.dtype | None = None,
    probe: NoiseProbe | None = None,
) -> None:
    """Of a model that DDP has just wrapped. Collective."""
    _settle_buckets(replicated)
    replicated.register_comm_hook(group, summing_hook(reduce_dtype, probe))


class _InOrder(nn.Module):
    """Uses every parameter of `model` once, in the order in which it has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return torch.stack([parameter.sum().float() for parameter in self.model.parameters()]).sum()


def _settle_buckets(replicated: DistributedDataParallel) -> None:
    """Have a first backward behind us, after which DDP cuts its buckets anew, once. Collective.

    Where a gradient lies in a bucket decides in which order three and more ranks' parts of it are added: else the first
    step after a start would be rounded unlike the same step of a run that went on.
    """
    model = replicated.module
    replicated.module = _InOrder(model)
    replicated().backward()
    replicated.module = model
    replicated.zero_grad(set_to_none=True)


def summing_hook(reduce_dtype: torch.dtype | None, probe: NoiseProbe | None = None) -> Hook:
    """The loss already carries one over the global token count: DDP's own average would divide twice."""

    def sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        gradients = bucket.buffer()
        if probe is not None:
            probe.add(gradients)
        travelling = gradients if reduce_dtype is None else gradients.to(reduce_dtype)
        work = dist.all_reduce(travelling, group=group, async_op=True)
        assert work is not None
        # The bucket's own storage is what the parameters' gradients look into.
        return work.get_future().then(lambda reduced: gradients.copy_(reduced.value()[0]))

    return sum_bucket
