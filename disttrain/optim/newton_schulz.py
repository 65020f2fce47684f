"""Newton-Schulz: a matrix with all singular values near one and the same singular vectors, by products alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Polynomials:
    """Each iteration maps singular values by x <- a x + b x^3 + c x^5, after X <- X / (safety |X|_F + eps)."""

    steps: tuple[Triple, ...]
    safety: float = 1.0
    eps: float = 1e-7


_KELLER: Triple = (3.4445, -4.7750, 2.0315)
POLYNOMIALS = {
    # Amsel et al., arXiv 2505.16932, for five iterations, with a cushion for bf16.
    "polar_express5": Polynomials(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        safety=1.02,
        eps=1e-6,
    ),
    # K. Jordan's, which torch.optim.Muon has too: singular values end between 0.7 and 1.2.
    "keller5": Polynomials((_KELLER,) * 5),
    # Another polynomial in each iteration (Y. Jiacheng).
    "you5": Polynomials(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    # Eight fast iterations and two that converge: where exactness matters.
    "deepseekv4": Polynomials((_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2),
}


def polynomials_of(coefficients: str | Sequence[Triple]) -> Polynomials:
    """A set by its name, or triples of one's own."""
    return POLYNOMIALS[coefficients] if isinstance(coefficients, str) else Polynomials(tuple(coefficients))


def newton_schulz(matrices: Tensor, polynomials: Polynomials, dtype: torch.dtype) -> Tensor:
    """The orthogonalised `matrices` [..., A, B] (one, or a stack of them), computed in `dtype`; a new tensor.

    Products are of the shorter side. A zero matrix stays zero.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    # In the computing type, as all implementations have it. Not in place: `x` may be the caller's momentum.
    x = x / (polynomials.safety * torch.linalg.matrix_norm(x, keepdim=True) + polynomials.eps)
    add_product = torch.baddbmm if x.dim() == 3 else torch.addmm
    for a, b, c in polynomials.steps:
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def newton_schulz_flops(rows: int, columns: int, iterations: int) -> float:
    """Floating-point operations for one matrix: three products an iteration."""
    short, long = sorted((rows, columns))
    return iterations * (4.0 * short * short * long + 2.0 * short**3)
