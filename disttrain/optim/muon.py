"""Muon and NorMuon on whole matrices: pure math, one matrix [A, B] or a stack [N, A, B] of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from disttrain.optim.newton_schulz import Polynomials, newton_schulz

State = dict[str, Tensor]


def lr_scale(kind: str, rows: int, columns: int) -> float:
    """What a direction [rows, columns] is multiplied by; `match_rms_adamw` gives the root mean square of an AdamW step
    (arXiv 2502.16982, section 2.2), `original` is K. Jordan's, `spectral` keeps the induced norm (arXiv 2310.17813)."""
    if kind == "original":
        return math.sqrt(max(1.0, rows / columns))
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns) if kind == "spectral" else 1.0


def muon_update(momenta: Tensor, state: State, *, polynomials: Polynomials, dtype: torch.dtype) -> Tensor:
    """The orthogonalised momentum; momentum itself is kept where the shards are, so `state` stays empty."""
    return newton_schulz(momenta, polynomials, dtype)


def normuon_state(matrix: Tensor) -> State:
    """`row_mean_square` [..., A, 1]."""
    return {"row_mean_square": matrix.new_zeros(*matrix.shape[:-1], 1)}


def normuon_update(
    momenta: Tensor, state: State, *, polynomials: Polynomials, dtype: torch.dtype, beta2: float, row_eps: float
) -> Tensor:
    """Muon with rows over the root of their running mean square, brought back to the length that it had
    (arXiv 2510.05491); norms are of whole matrices, so no layout changes them."""
    direction = newton_schulz(momenta, polynomials, dtype).to(momenta.dtype)
    mean_square = state["row_mean_square"]
    mean_square.lerp_(direction.square().mean(-1, keepdim=True), 1 - beta2)
    levelled = direction / (mean_square.sqrt() + row_eps)
    before, after = (torch.linalg.matrix_norm(x, keepdim=True) for x in (direction, levelled))
    return levelled * (before / after.clamp(min=torch.finfo(after.dtype).tiny))
