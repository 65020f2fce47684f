"""Shampoo (Gupta et al., arXiv 1802.09568) on one whole matrix, grafted onto Adam (Anil et al., arXiv 2002.09018).

Pure math without communication. All is computed in fp32, or fp64 for fp64 matrices, and kept in the matrix's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from disttrain.optim.soap import average_grams, average_moments, factor_state


def shampoo_state(matrix: Tensor, *, max_dim: int) -> dict[str, Tensor]:
    """`left_root` and `right_root` are the inverse roots of the last refresh."""
    return factor_state(matrix, max_dim, "root")


@torch.no_grad()
def shampoo_update(
    matrix: Tensor,
    state: dict[str, Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    ridge: float,
    every: int,
) -> Tensor:
    """The direction D for the gradient `matrix`, to be subtracted times lr; `state` follows in place.

    `state["step"]` counts from 1 and is the caller's. The roots are those of step 1, 1 + every, 1 + 2 every and so on,
    this step's gradient included. `ridge` is relative to the largest eigenvalue.
    """
    gradient = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    step = int(state["step"])
    grams = average_grams(gradient, state, betas[1])
    mean, squares = average_moments(gradient, state, betas, step)
    if (step - 1) % every == 0:
        for side, gram in grams.items():
            root = _inverse_root(gram / (1 - betas[1] ** step), 2 * len(grams), ridge)
            state[f"{side}_root"].copy_(root)
    direction = mean
    if "left" in grams:
        direction = state["left_root"].to(direction) @ direction
    if "right" in grams:
        direction = direction @ state["right_root"].to(direction)
    return _with_length_of(mean / (squares.sqrt() + eps), direction).to(matrix.dtype)


def shampoo_flops(rows: int, columns: int) -> float:
    """Two pairs of products, 2 A^2 B and 2 A B^2 each: Gram and roots; the eigenvalues are left out."""
    return 4.0 * rows * columns * (rows + columns)


def _inverse_root(gram: Tensor, root: int, ridge: float) -> Tensor:
    """gram^(-1/root). Without any gradient so far the identity: zeros would hold the weights until the next refresh."""
    values, vectors = torch.linalg.eigh(gram)
    largest = values[-1]
    values = (values + ridge * largest).clamp(min=torch.finfo(values.dtype).eps * largest)
    return (vectors * torch.where(largest > 0, values, 1.0).pow(-1 / root)) @ vectors.mT


def _with_length_of(model: Tensor, direction: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(direction)
    return direction * torch.where(length > 0, torch.linalg.vector_norm(model) / length, 0.0)
