"""A guard on updates, whatever the optimizer: no step moves a parameter by more than a share of its own norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.optim.sharding import copies, local, world_size

LEAST_RMS = 1e-3
"""The least root mean square that a weight counts as, so that parameters of zeros can leave zero."""


class UpdateLimit:
    """Around an optimizer's step: `remember` before it, `dist_apply` after it. Holds a copy of the shards meanwhile."""

    def __init__(self, parameters: Sequence[nn.Parameter], max_ratio: float) -> None:
        self.parameters, self.max_ratio = list(parameters), max_ratio
        device = local(self.parameters[0]).device
        self._copies = torch.tensor([copies(p, world_size()) for p in self.parameters], device=device).double()
        elements = torch.tensor([p.numel() for p in self.parameters], device=device)
        self._least = LEAST_RMS * elements.double().sqrt()
        self._before: list[Tensor] = []

    def remember(self) -> None:
        self._before = [local(parameter).detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def dist_apply(self) -> Tensor:
        """Shorten updates that were too long, where they are; the ratios [parameters] that they had, fp64.

        A ratio is |W' - W| / max(|W|, LEAST_RMS sqrt(elements)), of whole parameters in the Frobenius norm; one
        all-reduce. An update within the limit keeps every bit.
        """
        before, after = self._before, [local(p).detach() for p in self.parameters]
        self._before = []
        pairs = zip(before, after, strict=True)
        moved = torch.stack([torch.linalg.vector_norm(weight - start, dtype=torch.float64) for start, weight in pairs])
        norms = torch.stack(list(torch._foreach_norm(before))).double()
        squares = torch.stack([moved, norms]).square() / self._copies
        dist.all_reduce(squares)
        steps, weights = squares.sqrt()
        ratios = steps / torch.maximum(weights, self._least)
        shares = (self.max_ratio / ratios).clamp(max=1.0)
        for start, weight, share in zip(before, after, shares.unbind(), strict=True):
            # With a share of one, lerp gives its second argument to the bit; an infinite step is not taken at all.
            shortened = torch.lerp(start, weight, share.to(weight.dtype))
            weight.copy_(torch.where(share > 0, shortened, start))
        return ratios
