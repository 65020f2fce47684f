"""The rules by which a group of gradients is clipped that need no memory, and what every rule is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.config.clipping import AGC, ClipNorm, ClipValue
from disttrain.optim.held_gradients import HeldGradients


@dataclass(frozen=True)
class Seen:
    """What all ranks know of a group's gradients, without the loss scale."""

    squares: Tensor
    """[parameters] sums of squares."""
    norm: Callable[[float, str], Tensor]
    """Of an order, over the `group` or `all` groups."""
    sums: Sequence[Tensor]
    """The rule's own `entries`, summed over ranks."""
    finite: Tensor
    """Whether all gradients of all groups are finite: a rule's memory must not learn from others."""


@dataclass(frozen=True)
class Decision:
    factors: Tensor
    """[parts] of at most 1."""
    share: Tensor
    """How much of the group is clipped, from 0 to 1."""
    norms: Tensor | None = None
    """[units] of a rule that remembers: what it judged by, before clipping."""
    thresholds: Tensor | None = None
    """[units] norms from which it clips; infinite where it does not yet."""


class ClipRule:
    """The gradients stay as they are; the base of the others. Called in this order, with a sum over ranks between."""

    order: float | None = None
    """Of a norm that it needs besides the 2-norm."""
    over = "group"
    max_norm = 0.0
    """Of the norm of all groups with such a limit together, after the rules themselves; 0 for none."""
    names: Sequence[str] = ()
    """Of parts that have a history, one for each row of `state`."""
    state: Tensor = torch.empty(0)

    def __init__(self, count: int) -> None:
        self.parts: list[list[int]] = [list(range(count))]
        """Positions of the group's parameters that share a factor."""
        self._padded: Tensor | None = None

    def part_squares(self, squares: Tensor) -> Tensor:
        """[parts] sums of [parameters], in the same order on every rank."""
        if self._padded is None:
            longest = max(len(members) for members in self.parts)
            padded = [members + [len(squares)] * (longest - len(members)) for members in self.parts]
            self._padded = torch.tensor(padded, device=squares.device)
        return torch.cat([squares, squares.new_zeros(1)])[self._padded].sum(dim=1)

    def entries(self, held: HeldGradients, unscale: Tensor) -> list[Tensor]:
        """This rank's part of further sums over ranks; the gradients still carry the loss scale."""
        return []

    def decide(self, seen: Seen) -> Decision:
        return Decision(seen.squares.new_ones(1), seen.squares.new_zeros(()))

    def finish(self, held: HeldGradients) -> None:
        """What no factor expresses; the gradients are without the loss scale and multiplied by the factors."""


class ValueRule(ClipRule):
    def __init__(self, clip: ClipValue, count: int) -> None:
        super().__init__(count)
        self.clip = clip

    def entries(self, held: HeldGradients, unscale: Tensor) -> list[Tensor]:
        self.elements = held.elements
        beyond = [
            (gradient.abs() * unscale > self.clip.limit).sum() / held.copies[position]
            for position, gradient in held.gradients.items()
        ]
        return [torch.stack(beyond).sum().double().reshape(1) if beyond else held.zeros(1)]

    def decide(self, seen: Seen) -> Decision:
        return Decision(seen.squares.new_ones(1), seen.sums[0].sum() / max(self.elements, 1))

    def finish(self, held: HeldGradients) -> None:
        if gradients := [*held.gradients.values()]:
            torch._foreach_clamp_min_(gradients, -self.clip.limit)
            torch._foreach_clamp_max_(gradients, self.clip.limit)


class NormRule(ClipRule):
    def __init__(self, clip: ClipNorm, count: int) -> None:
        super().__init__(count)
        self.limit, self.order, self.over = clip.limit, clip.order, clip.over

    def decide(self, seen: Seen) -> Decision:
        scale = clip_scale(seen.norm(self.order or 2.0, self.over), self.limit)
        return Decision(scale.reshape(1), (scale < 1).double())


class AGCRule(ClipRule):
    """Rows need no other rank where matrices are cut along dim 0; vectors count as one row and wait for the sums."""

    def __init__(self, clip: AGC, count: int, skipped: set[int]) -> None:
        super().__init__(count)
        self.clip, self.skipped = clip, skipped

    def entries(self, held: HeldGradients, unscale: Tensor) -> list[Tensor]:
        weights, clipped = held.zeros(held.count), held.zeros(1)
        self._rows: dict[int, Tensor] = {}
        self._row_count, self._vectors = 0, torch.zeros(held.count, dtype=torch.bool)
        for position, gradient in self._chosen(held):
            weight = held.weight(position)
            if gradient.ndim < 2:
                self._vectors[position] = True
                weights[position] = weight.double().square().sum() / held.copies[position]
                continue
            norms = (torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float64) for t in (gradient, weight))
            self._rows[position] = self._factor(next(norms) * unscale, next(norms))
            self._row_count += held.parameters[position].shape[0]
            clipped += (self._rows[position] < 1).sum() / held.copies[position]
        return [clipped, weights]

    def decide(self, seen: Seen) -> Decision:
        clipped, weights = seen.sums
        self._factors = self._factor(seen.squares.sqrt(), weights.sqrt())
        vectors = self._vectors.to(weights.device)
        share = (clipped.sum() + (vectors & (self._factors < 1)).sum()) / max(
            self._row_count + int(self._vectors.sum()), 1
        )
        return Decision(seen.squares.new_ones(1), share)

    def finish(self, held: HeldGradients) -> None:
        for position, gradient in self._chosen(held):
            factors = self._rows.get(position)
            if factors is None:
                gradient.mul_(self._factors[position].to(gradient.dtype))
            else:
                gradient.mul_(factors.to(gradient.dtype).reshape(-1, *[1] * (gradient.ndim - 1)))

    def _factor(self, gradient: Tensor, weight: Tensor) -> Tensor:
        return (self.clip.limit * weight.clamp(min=self.clip.eps) / gradient).clamp(max=1.0)

    def _chosen(self, held: HeldGradients) -> Iterator[tuple[int, Tensor]]:
        return ((p, gradient) for p, gradient in held.gradients.items() if p not in self.skipped)


def clip_scale(grad_norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """The factor of at most one that brings `grad_norm` down to `max_norm` (torch's formula, arXiv 1211.5063)."""
    return (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
