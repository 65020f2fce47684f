"""One group's gradients as a rank holds them, and what it adds to sums over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.optim.sharding import copies, local


class HeldGradients:
    """Of `parameters` on this rank of `world`; what ranks hold together counts once in a sum over all of them.

    Made once for a run; `look` takes the gradients of a step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world: int) -> None:
        self.parameters, self.world = list(parameters), world
        self.count, self.elements = len(self.parameters), sum(p.numel() for p in self.parameters)
        self.device = local(self.parameters[0]).device
        self.copies = [copies(parameter, world) for parameter in self.parameters]
        self._held_by = torch.tensor(self.copies, dtype=torch.float64, device=self.device)
        self._present = (list(range(self.count)), torch.arange(self.count, device=self.device))
        self.gradients: dict[int, Tensor] = {}
        """Local gradients by the parameter's position; those that there are."""

    def look(self) -> None:
        self.gradients = {i: local(p.grad) for i, p in enumerate(self.parameters) if p.grad is not None}
        if list(self.gradients) != self._present[0]:
            self._present = (list(self.gradients), torch.tensor([*self.gradients], device=self.device))

    def forget(self) -> None:
        """Call at the end of a step: a gradient that is kept here would stay in memory through the next backward."""
        self.gradients = {}

    def weight(self, position: int) -> Tensor:
        return local(self.parameters[position]).detach()

    def zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    def powers(self, order: float) -> Tensor:
        """[parameters] this rank's part of the sums of |g|^order; 0 where there is no gradient; fp64."""
        powers = self.zeros(self.count)
        if self.gradients:
            norms = torch.stack(list(torch._foreach_norm([*self.gradients.values()], ord=order))).double()
            powers[self._present[1]] = norms**order
        return powers / self._held_by

    def largest(self) -> Tensor:
        """[world] a slot for every rank with the largest |g| that it holds: a sum must not add maxima up."""
        found = [gradient.abs().max().double() for gradient in self.gradients.values() if gradient.numel()]
        slots = self.zeros(self.world)
        if found:
            slots[dist.get_rank()] = torch.stack(found).max()
        return slots

    def entry(self, order: float) -> Tensor:
        """What the norm of `order` of the whole group needs from this rank."""
        return self.largest() if math.isinf(order) else self.powers(order).sum().reshape(1)

    def multiply(self, parts: Sequence[Sequence[int]], factors: Tensor) -> None:
        """Scale the gradients of the parameters at the positions of each part by its factor [parts], in place."""
        if not self.gradients:
            return
        dtype = next(iter(self.gradients.values())).dtype
        for members, factor in zip(parts, factors.to(dtype).unbind(), strict=True):
            if chosen := [self.gradients[position] for position in members if position in self.gradients]:
                torch._foreach_mul_(chosen, factor)


def norm_of_entry(total: Tensor, order: float) -> Tensor:
    """The norm from the sum over ranks of `HeldGradients.entry`."""
    return total.max() if math.isinf(order) else total.sum() ** (1 / order)
