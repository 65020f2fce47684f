"""Gradient norms over any mix of layouts by one all-reduce, and clipping by group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.config.groups import ClipNorm, ClipValue
from disttrain.optim.sharding import copies, local


@dataclass(frozen=True)
class GradientNorms:
    """Device tensors in fp64, equal on all ranks; groups and parameters in the order of the optimizer's groups."""

    total: Tensor
    """The 2-norm of all gradients together, before clipping, without the loss scale."""
    parameters: Tensor
    """[parameters] 2-norms; 0 for a parameter without a gradient."""
    groups: Tensor
    """[groups] 2-norms."""
    scales: Tensor
    """[groups] what each group's gradients were multiplied by to clip their norm: at most 1."""
    shares: Tensor
    """[groups] how much was clipped: 0 or 1 by norm, by value the share of the group's elements."""


@torch.no_grad()
def dist_clip_gradients(groups: Sequence[Mapping[str, Any]], unscale: Tensor) -> GradientNorms:
    """Multiply all gradients by `unscale` (a scalar), then clip each of torch's parameter groups by its `config.clip`.

    One all-reduce over the world, whatever the groups ask for: each rank adds what it holds, divided by the number of
    ranks that hold the same, and empty shards add zero. Ranks must pass the same groups, with reduced gradients.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    clips = [group["config"].clip for group in groups]
    shared = {clip.order for clip in clips if isinstance(clip, ClipNorm) and clip.over == "all"}
    held = [_Held(group["params"], clip, shared, world, rank) for group, clip in zip(groups, clips, strict=True)]
    device = next((gradient.device for group in held for gradient in group.gradients), torch.device("cpu"))
    # Offloaded gradients lie on the host, the scale with the model.
    unscale = unscale.to(device, torch.float64)
    sums = torch.cat([entry for group in held for entry in group.entries(unscale)])
    dist.all_reduce(sums)
    entries = iter(sums.split([size for group in held for size in group.sizes]))
    for group in held:
        group.read(entries, unscale)
    together = {order: _join([group.norms[order] for group in held], order) for order in shared}
    scales = torch.stack([group.clip_gradients(together, unscale) for group in held])
    squares = torch.stack([group.squares.sum() for group in held])
    return GradientNorms(
        total=squares.sum().sqrt(),
        parameters=torch.cat([group.squares for group in held]).sqrt(),
        groups=squares.sqrt(),
        scales=scales,
        shares=torch.stack([group.share(scale) for group, scale in zip(held, scales, strict=True)]),
    )


def clip_scale(grad_norm: Tensor, max_norm: float) -> Tensor:
    """The factor of at most one that brings `grad_norm` down to `max_norm` (torch's formula, arXiv 1211.5063)."""
    return (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)


class _Held:
    """One group's gradients on this rank, what it adds to the sum over ranks, and what it takes from it."""

    def __init__(self, parameters: list[nn.Parameter], clip: Any, orders: set[float], world: int, rank: int) -> None:
        self.clip, self.world, self.rank = clip, world, rank
        own = {clip.order} if isinstance(clip, ClipNorm) else set()
        self.orders = sorted((orders | own) - {2.0})
        gradients = {index: p.grad for index, p in enumerate(parameters) if p.grad is not None}
        self.present = list(gradients)
        self.gradients = [local(gradient) for gradient in gradients.values()]
        self.copies = [copies(gradient, world) for gradient in gradients.values()]
        self.count, self.elements = len(parameters), sum(p.numel() for p in parameters)
        self.norms: dict[float, Tensor] = {}

    @property
    def sizes(self) -> list[int]:
        """The lengths of `entries`: a maximum has a slot for every rank, for the sum must not add maxima up."""
        by_value = [1] if isinstance(self.clip, ClipValue) else []
        return [self.count, *(self.world if math.isinf(order) else 1 for order in self.orders), *by_value]

    def entries(self, unscale: Tensor) -> Iterator[Tensor]:
        squares = unscale.new_zeros(self.count)
        if self.present:
            squares[self.present] = self._powers(2.0)
        yield squares
        for order in self.orders:
            if math.isinf(order):
                largest = [gradient.abs().max().double() for gradient in self.gradients if gradient.numel()]
                slots = unscale.new_zeros(self.world)
                slots[self.rank] = torch.stack(largest).max() if largest else 0.0
                yield slots
            else:
                yield self._powers(order).sum().reshape(1) if self.present else unscale.new_zeros(1)
        if isinstance(self.clip, ClipValue):
            pairs = zip(self.gradients, self.copies, strict=True)
            beyond = [(gradient.abs() * unscale > self.clip.limit).sum() / held for gradient, held in pairs]
            yield torch.stack(beyond).sum().double().reshape(1) if beyond else unscale.new_zeros(1)

    def read(self, entries: Iterator[Tensor], unscale: Tensor) -> None:
        """Take this group's part of the sums over ranks, in the order of `entries`."""
        self.squares = next(entries) * unscale.square()
        self.norms[2.0] = self.squares.sum().sqrt()
        for order in self.orders:
            total = next(entries)
            self.norms[order] = unscale * (total.max() if math.isinf(order) else total.sum() ** (1 / order))
        self.beyond = next(entries).sum() if isinstance(self.clip, ClipValue) else None

    def clip_gradients(self, together: Mapping[float, Tensor], unscale: Tensor) -> Tensor:
        """Change the gradients in place; the factor by which their norm was clipped."""
        scale = torch.ones_like(unscale)
        if isinstance(self.clip, ClipNorm):
            norms = together if self.clip.over == "all" else self.norms
            scale = clip_scale(norms[self.clip.order], self.clip.limit)
        if self.gradients:
            torch._foreach_mul_(self.gradients, (scale * unscale).to(self.gradients[0].dtype))
        if self.gradients and isinstance(self.clip, ClipValue):
            torch._foreach_clamp_min_(self.gradients, -self.clip.limit)
            torch._foreach_clamp_max_(self.gradients, self.clip.limit)
        return scale

    def share(self, scale: Tensor) -> Tensor:
        return (scale < 1).double() if self.beyond is None else self.beyond / self.elements

    def _powers(self, order: float) -> Tensor:
        """[gradients present] sums of |g|^order, divided by the number of ranks that hold the same; fp64."""
        norms = torch.stack(list(torch._foreach_norm(self.gradients, ord=order))).double()
        return norms**order / torch.tensor(self.copies, dtype=torch.float64, device=norms.device)


def _join(norms: Sequence[Tensor], order: float) -> Tensor:
    """The norm of all groups together from the norm of each."""
    stacked = torch.stack(list(norms))
    return stacked.max() if math.isinf(order) else (stacked**order).sum() ** (1 / order)
