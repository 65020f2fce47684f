"""One group's gradients as a rank holds them, and what it adds to sums over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from disttrain.optim.sharding import copies, local


class HeldGradients:
    """Of `parameters` on one rank of `world`; what ranks hold together counts once in a sum over all of them."""

    def __init__(self, parameters: Sequence[nn.Parameter], world: int, rank: int, device: torch.device) -> None:
        self.world, self.rank, self.device = world, rank, device
        self.count, self.elements = len(parameters), sum(p.numel() for p in parameters)
        gradients = {index: p.grad for index, p in enumerate(parameters) if p.grad is not None}
        self.present = list(gradients)
        """Positions of the parameters that have a gradient, in the order of the next three."""
        self.gradients = [local(gradient) for gradient in gradients.values()]
        self.weights = [local(parameters[index]).detach() for index in self.present]
        self.copies = [copies(gradient, world) for gradient in gradients.values()]

    def zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    def powers(self, order: float) -> Tensor:
        """[parameters] this rank's part of the sums of |g|^order; 0 where there is no gradient; fp64."""
        powers = self.zeros(self.count)
        if self.present:
            norms = torch.stack(list(torch._foreach_norm(self.gradients, ord=order))).double()
            powers[self.present] = norms**order / torch.tensor(self.copies, dtype=torch.float64, device=norms.device)
        return powers

    def largest(self) -> Tensor:
        """[world] a slot for every rank with the largest |g| that it holds: a sum must not add maxima up."""
        found = [gradient.abs().max().double() for gradient in self.gradients if gradient.numel()]
        slots = self.zeros(self.world)
        slots[self.rank] = torch.stack(found).max() if found else 0.0
        return slots

    def entry(self, order: float) -> Tensor:
        """What the norm of `order` of the whole group needs from this rank."""
        return self.largest() if math.isinf(order) else self.powers(order).sum().reshape(1)

    def multiply(self, positions: Sequence[int], factor: Tensor) -> None:
        """Scale the gradients of the parameters at `positions` in place."""
        wanted = set(positions)
        chosen = [g for index, g in zip(self.present, self.gradients, strict=True) if index in wanted]
        if chosen:
            torch._foreach_mul_(chosen, factor.to(chosen[0].dtype))


def norm_of_entry(total: Tensor, order: float) -> Tensor:
    """The norm from the sum over ranks of `HeldGradients.entry`."""
    return total.max() if math.isinf(order) else total.sum() ** (1 / order)
