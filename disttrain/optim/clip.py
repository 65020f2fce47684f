"""The global gradient norm over any mix of layouts, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def dist_grad_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together as an fp64 scalar that is the same on every rank, by one all-reduce.

    Each rank adds the squares of what it holds, divided by the number of ranks that hold the same. Empty shards add
    zero; ranks must pass the same parameters, with gradients reduced already.
    """
    world = dist.get_world_size()
    local = [(_local(p.grad), _copies(p.grad, world)) for p in parameters if p.grad is not None]
    device = local[0][0].device if local else torch.device("cpu")
    norms = torch._foreach_norm([gradient for gradient, _ in local]) if local else []
    total = torch.zeros((), dtype=torch.float64, device=device)
    for norm, (_, copies) in zip(norms, local, strict=True):
        total += norm.double().square() / copies
    dist.all_reduce(total)
    return total.sqrt()


def clip_scale(grad_norm: Tensor, max_norm: float) -> Tensor:
    """The factor of at most one that brings `grad_norm` down to `max_norm` (torch's formula, arXiv 1211.5063)."""
    return (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], scale: Tensor) -> None:
    """Multiply all gradients by a scalar tensor, without asking the device for its value."""
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        # Offloaded gradients lie on the host, the scale with the model.
        torch._foreach_mul_(gradients, scale.to(gradients[0]))


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _copies(gradient: Tensor, world: int) -> int:
    """How many ranks hold the numbers that this rank holds of `gradient`."""
    if not isinstance(gradient, DTensor):
        return world
    mesh = gradient.device_mesh
    copies = world // mesh.size()
    for axis, placement in enumerate(gradient.placements):
        if placement.is_replicate():
            copies *= mesh.size(axis)
    return copies
