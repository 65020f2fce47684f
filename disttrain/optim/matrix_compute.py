"""What an owner computes between the exchanges: equal matrices together, the others one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from disttrain.optim.matrix_setup import Matrix, MatrixSet

Step = Callable[[Matrix], Tensor]


def owner_directions(owned: MatrixSet, wholes: dict[int, Tensor], step_of: Step, batched: bool) -> dict[int, Tensor]:
    """The directions of the matrices in `wholes`, by their number in `owned`; `wholes` is emptied on the way.

    With `batched`, equal shapes of one group are one stack, where the algorithm can.
    """
    stacks: dict[Any, list[int]] = {}
    for index, whole in wholes.items():
        matrix = owned.matrices[index]
        together = batched and matrix.update.batched
        stacks.setdefault((id(matrix.group), whole.shape) if together else index, []).append(index)
    directions: dict[int, Tensor] = {}
    for members in stacks.values():
        # The parameter's type again: a matrix that travelled in fewer bits is computed as any other.
        dtype = owned.matrices[members[0]].parameter.dtype
        given = [wholes.pop(index).to(dtype) for index in members]
        compute = _one if len(members) == 1 else _stack
        directions |= compute(owned, members, given, step_of)
    return directions


def _one(owned: MatrixSet, members: list[int], given: list[Tensor], step_of: Step) -> dict[int, Tensor]:
    (index,), (whole,) = members, given
    matrix = owned.matrices[index]
    return {index: matrix.update(matrix.name, whole, owned.states[index], step_of(matrix))}


def _stack(owned: MatrixSet, members: list[int], given: list[Tensor], step_of: Step) -> dict[int, Tensor]:
    first, states = owned.matrices[members[0]], [owned.states[index] for index in members]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    directions = first.update(first.name, torch.stack(given), stacked, step_of(first))
    for key, values in stacked.items():
        for state, value in zip(states, values, strict=True):
            state[key].copy_(value)
    return dict(zip(members, directions, strict=True))
