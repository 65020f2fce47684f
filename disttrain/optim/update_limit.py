"""A guard on updates, whatever the optimizer: no step moves a parameter by more than a share of its own norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.optim.sharding import copies, local

LEAST_RMS = 1e-3
"""The least root mean square that a weight counts as, so that parameters of zeros can leave zero."""


class UpdateLimit:
    """Around an optimizer's step: `remember` before it, `dist_apply` after it. Holds a copy of the shards meanwhile."""

    def __init__(self, parameters: Sequence[nn.Parameter], max_ratio: float) -> None:
        self.parameters, self.max_ratio = list(parameters), max_ratio
        self._before: list[Tensor] = []

    def remember(self) -> None:
        self._before = [local(parameter).detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def dist_apply(self) -> Tensor:
        """Shorten updates that were too long, where they are; the ratios [parameters] that they had, fp64.

        A ratio is |W' - W| / max(|W|, LEAST_RMS sqrt(elements)), of whole parameters in the Frobenius norm; one
        all-reduce. An update within the limit keeps every bit.
        """
        world, before, after = dist.get_world_size(), self._before, [local(p).detach() for p in self.parameters]
        self._before = []
        moved = torch._foreach_norm(torch._foreach_sub(after, before))
        norms = torch.stack([torch.stack(list(moved)), torch.stack(list(torch._foreach_norm(before)))]).double()
        held = torch.tensor([copies(p, world) for p in self.parameters], dtype=torch.float64, device=norms.device)
        squares = norms.square() / held
        dist.all_reduce(squares)
        least = LEAST_RMS * torch.tensor([p.numel() for p in self.parameters], device=norms.device).double().sqrt()
        steps, weights = squares.sqrt()
        ratios = steps / torch.maximum(weights, least)
        shares = (self.max_ratio / ratios).clamp(max=1.0)
        for start, weight, share in zip(before, after, shares, strict=True):
            # With a share of one, lerp gives its second argument to the bit.
            weight.copy_(torch.lerp(start, weight, share.to(weight.dtype)))
        return ratios
