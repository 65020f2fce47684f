"""Matrix optimizers as somebody else might write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows_by_their_mean(matrix: Tensor, state: dict[str, Tensor], power: float = 1.0) -> Tensor:
    """Looks at whole rows and at the whole matrix: wrong on a shard."""
    return matrix.sign() * matrix.abs().mean(dim=1, keepdim=True) ** power / matrix.norm().clamp(min=1e-9)


class Whitened:
    """Keeps an average of G G^T, and says what it costs."""

    def initial_state(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"gram": matrix.new_zeros(matrix.shape[0], matrix.shape[0])}

    def __call__(self, matrix: Tensor, state: dict[str, Tensor], beta: float = 0.9) -> Tensor:
        state["gram"] = beta * state["gram"] + (1 - beta) * matrix @ matrix.mT
        ridge = state["gram"].diagonal().mean() + 1e-3
        identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve(state["gram"] / (1 - beta ** int(state["step"])) + ridge * identity, matrix)

    def flops(self, rows: int, columns: int) -> float:
        return 4.0 * rows * rows * columns


class Stacked:
    """Takes stacks of equal matrices, with their states."""

    batched = True

    def initial_state(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"largest": matrix.new_zeros(())}

    def __call__(self, matrices: Tensor, state: dict[str, Tensor]) -> Tensor:
        state["largest"] = torch.maximum(state["largest"], matrices.abs().amax(dim=(-2, -1)))
        return matrices / state["largest"].clamp(min=1e-9)[..., None, None]


class Unstackable(Stacked):
    """Says that it takes stacks, and looks at all of a stack as if it were one matrix."""

    def __call__(self, matrices: Tensor, state: dict[str, Tensor]) -> Tensor:
        return matrices / matrices.norm()


def transposed(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    return matrix.mT


def nothing(matrix: Tensor, state: dict[str, Tensor]) -> None:
    return None


def raising(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    raise ArithmeticError("no such luck")


def random(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    return torch.rand_like(matrix)


def remembering(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["last"] = matrix
    return matrix


class Growing(Whitened):
    def __call__(self, matrix: Tensor, state: dict[str, Tensor], beta: float = 0.9) -> Tensor:
        state["gram"] = torch.cat([state["gram"], state["gram"]])
        return matrix


class Inconsistent(Whitened):
    def initial_state(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"meta": matrix.new_zeros(2)} if matrix.is_meta else {"real": matrix.new_zeros(2)}


class Reserved(Whitened):
    def initial_state(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": matrix.new_zeros(matrix.shape)}


class Free(Whitened):
    def flops(self, rows: int, columns: int) -> float:
        return 0.0


class Late:
    """Right on toys, wrong on one matrix of the model: what only the owner finds out."""

    def __call__(self, matrix: Tensor, state: dict[str, Tensor]) -> Any:
        return matrix[:-1] if matrix.shape == (3, 10) else matrix


NUMBER = 3
