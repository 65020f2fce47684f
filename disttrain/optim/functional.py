"""Element-wise updates: pure math on lists of plain tensors, in place, without communication.

`weights`, `gradients` and averages are lists of equal length, tensor by tensor of the same shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def lion_update(
    weights: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """One step along the sign of the interpolated momentum (Chen et al., arXiv 2302.06675, algorithm 2)."""
    directions = torch._foreach_lerp(averages, gradients, 1 - betas[0])
    torch._foreach_sign_(directions)
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, directions, alpha=-lr)
    torch._foreach_lerp_(averages, gradients, 1 - betas[1])


def ademamix_alpha(step: int, alpha: float, warmup_steps: int) -> float:
    """The slow average's weight at `step` (from 1): linear from zero."""
    return alpha * min(1.0, step / warmup_steps) if warmup_steps else alpha


def ademamix_beta3(step: int, beta1: float, beta3: float, warmup_steps: int) -> float:
    """The slow average's beta at `step`: its half-life grows linearly from that of `beta1` (section 3 of the paper)."""
    if step >= warmup_steps:
        return beta3
    share = step / warmup_steps
    half_life = (1 - share) * _half_life(beta1) + share * _half_life(beta3)
    return 0.5 ** (1 / (half_life + 1))


def _half_life(beta: float) -> float:
    return math.log(0.5) / math.log(beta) - 1 if beta else -1.0


@torch.no_grad()
def ademamix_update(
    weights: list[Tensor],
    gradients: list[Tensor],
    fast: list[Tensor],
    slow: list[Tensor],
    squares: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float, float],
    alpha: float,
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW whose momentum is a fast, bias-corrected average plus `alpha` times a slow one (arXiv 2409.03137).

    `alpha` and the third beta are those of this step.
    """
    beta1, beta2, beta3 = betas
    torch._foreach_lerp_(fast, gradients, 1 - beta1)
    torch._foreach_lerp_(slow, gradients, 1 - beta3)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    directions = torch._foreach_div(fast, 1 - beta1**step)
    torch._foreach_add_(directions, slow, alpha=alpha)
    torch._foreach_div_(directions, _root_mean_squares(squares, 1 - beta2**step, eps))
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, directions, alpha=-lr)


@torch.no_grad()
def schedule_free_update(
    weights: list[Tensor],
    gradients: list[Tensor],
    ends: list[Tensor],
    squares: list[Tensor],
    *,
    step: int,
    lr: float,
    average_weight: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Schedule-Free AdamW (Defazio et al., arXiv 2405.15682): `weights` are y = (1 - beta1) z + beta1 x, `ends` are z.

    z steps along the normalised gradient, x moves to it by the share `average_weight`, y follows; x is never kept.
    """
    beta1, beta2 = betas
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    directions = torch._foreach_div(gradients, _root_mean_squares(squares, 1 - beta2**step, eps))
    torch._foreach_add_(directions, weights, alpha=weight_decay)
    # y' = (1 - beta1) z' + beta1 ((1 - c) x + c z') with beta1 x = y - (1 - beta1) z and z' = z - lr d.
    torch._foreach_lerp_(weights, ends, average_weight)
    torch._foreach_add_(weights, directions, alpha=lr * (beta1 * (1 - average_weight) - 1))
    torch._foreach_sub_(ends, directions, alpha=lr)


@torch.no_grad()
def schedule_free_average(weight: Tensor, end: Tensor, beta1: float) -> Tensor:
    """The point x that a schedule-free model is used at, from y and z; a new tensor."""
    return (weight - (1 - beta1) * end) / beta1


def _root_mean_squares(squares: list[Tensor], correction: float, eps: float) -> tuple[Tensor, ...] | list[Tensor]:
    roots = torch._foreach_div(squares, correction)
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, eps)
    return roots
