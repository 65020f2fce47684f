"""SOAP (Vyas et al., arXiv 2409.11321) on one whole matrix: Adam in the eigenbases of Shampoo's Gram matrices.

Pure math without communication. All is computed in fp32, or fp64 for fp64 matrices, and kept in the matrix's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIDES = ("left", "right")


def soap_state(matrix: Tensor, *, max_dim: int) -> dict[str, Tensor]:
    """`left_basis` and `right_basis` hold eigenvectors as columns, `exp_avg` and `exp_avg_sq` live in these bases."""
    return factor_state(matrix, max_dim, "basis")


def factor_state(matrix: Tensor, max_dim: int, factor: str) -> dict[str, Tensor]:
    """State of a matrix [A, B] before its first step, all zeros; of a meta matrix, on the meta device.

    `left` [A, A] and `right` [B, B] average G G^T and G^T G, `left_FACTOR` and `right_FACTOR` are made of them; a side
    longer than `max_dim` has neither. `exp_avg` and `exp_avg_sq` [A, B] are Adam's.
    """
    state = {name: matrix.new_zeros(matrix.shape) for name in ("exp_avg", "exp_avg_sq")}
    for side, size in zip(SIDES, matrix.shape, strict=True):
        if size <= max_dim:
            state |= {name: matrix.new_zeros(size, size) for name in (side, f"{side}_{factor}")}
    return state


@torch.no_grad()
def soap_update(
    matrix: Tensor,
    state: dict[str, Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    every: int,
) -> Tensor:
    """The direction D for the gradient `matrix`, to be subtracted times lr; `state` follows in place.

    `state["step"]` counts from 1 and is the caller's. The first step only finds the bases and returns zeros: in bases
    made of itself a gradient is diagonal, and Adam would follow the sign of the rounding noise beside the diagonal.
    Every `every` steps after it the bases turn; this step's direction still comes from the old ones.
    """
    gradient = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    count = int(state["step"]) - 1
    if count == 0:
        for side, gram in average_grams(gradient, state, betas[1]).items():
            state[f"{side}_basis"].copy_(_first_basis(gram))
        return matrix.new_zeros(matrix.shape)
    mean, squares = average_moments(_rotated(gradient, state), state, betas, count)
    direction = _rotated(mean / (squares.sqrt() + eps), state, back=True)
    grams = average_grams(gradient, state, betas[1])
    if count % every == 0:
        _turn_bases(state, grams, gradient.dtype)
    return direction.to(matrix.dtype)


def soap_flops(rows: int, columns: int) -> float:
    """Three pairs of products, 2 A^2 B and 2 A B^2 each: into the bases, back, Gram; eigh and QR are left out."""
    return 6.0 * rows * columns * (rows + columns)


def average_grams(gradient: Tensor, state: dict[str, Tensor], beta: float) -> dict[str, Tensor]:
    """The averages of G G^T and G^T G after `gradient` [A, B], for the sides that have one; kept in `state`."""
    turned = dict(zip(SIDES, (gradient, gradient.mT), strict=True))
    return {s: average_into(state[s], g @ g.mT, beta) for s, g in turned.items() if s in state}


def average_moments(
    gradient: Tensor, state: dict[str, Tensor], betas: tuple[float, float], count: int
) -> tuple[Tensor, Tensor]:
    """Adam's averages of the gradient and its square after update number `count`, bias-corrected; new tensors."""
    mean = average_into(state["exp_avg"], gradient, betas[0])
    squares = average_into(state["exp_avg_sq"], gradient.square(), betas[1])
    return mean / (1 - betas[0] ** count), squares / (1 - betas[1] ** count)


def average_into(kept: Tensor, value: Tensor, beta: float) -> Tensor:
    """beta kept + (1 - beta) value, written to `kept` and returned in the precision of `value`."""
    average = kept.to(value.dtype).lerp_(value, 1 - beta)
    kept.copy_(average)
    return average


def _rotated(matrix: Tensor, state: dict[str, Tensor], *, back: bool = False) -> Tensor:
    """The matrix in the bases, Q_L^T M Q_R, or `back` from them; a side without one stays as it is."""
    left, right = (state[f"{side}_basis"].to(matrix) if side in state else None for side in SIDES)
    matrix = matrix if left is None else (left if back else left.mT) @ matrix
    return matrix if right is None else matrix @ (right.mT if back else right)


def _first_basis(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    # Drawn on the host: a device would draw others.
    spare = torch.randn(gram.shape, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
    return _orthonormal((vectors * values).flip(1), spare.to(gram.device))


def _turn_bases(state: dict[str, Tensor], grams: dict[str, Tensor], precise: torch.dtype) -> None:
    """One power iteration; `exp_avg` turns with the bases, `exp_avg_sq` only follows the order of their columns."""
    mean = _rotated(state["exp_avg"].to(precise), state, back=True)
    for side, gram in grams.items():
        basis = state[f"{side}_basis"].to(precise)
        product = gram @ basis
        order = (basis * product).sum(dim=0).argsort(descending=True, stable=True)
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].index_select(SIDES.index(side), order))
        state[f"{side}_basis"].copy_(_orthonormal(product[:, order], basis[:, order]))
    state["exp_avg"].copy_(_rotated(mean, state))


def _orthonormal(columns: Tensor, spare: Tensor) -> Tensor:
    """QR's Q. A column that depends on those before it leaves noise there: `spare` has another in its place.

    Gram matrices start with the rank of one gradient, and which basis the rest gets decides what Adam does in it.
    """
    basis, triangle = torch.linalg.qr(columns)
    lengths = triangle.diagonal().abs()
    noise = lengths < lengths.max() * torch.finfo(lengths.dtype).eps ** 0.75
    return torch.linalg.qr(torch.where(noise, spare, columns))[0] if bool(noise.any()) else basis
