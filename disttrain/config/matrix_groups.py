"""Groups of matrices: algorithms that need each matrix whole, wherever its shards are.

All of them step by `W <- (1 - lr weight_decay) W - lr lr_scale D`, with D the algorithm's direction for a whole matrix.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from disttrain.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Regex, Section
from disttrain.config.groups import Beta, Betas, Group

LrScale = Literal["original", "match_rms_adamw", "spectral", "none"]
CoefficientSet = Literal["polar_express5", "keller5", "you5", "deepseekv4"]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]


def _set_or_triples(value: Any) -> Any:
    """One problem in words, where a union would tell one for each of its kinds."""
    triples = isinstance(value, list | tuple) and value and all(_numbers(t, 3) for t in value)
    if value not in get_args(CoefficientSet) and not triples:
        raise ValueError(
            f"must be one of {', '.join(get_args(CoefficientSet))}, or a list of [a, b, c], one an iteration"
        )
    return value


def _size_or_sizes(value: Any) -> Any:
    whole = [value] if isinstance(value, int) else value
    if not (isinstance(whole, list | tuple) and whole and all(type(size) is int and size > 0 for size in whole)):
        raise ValueError("must be a positive whole number, or a list of them")
    return value


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(type(n) in (int, float) for n in value)


Coefficients = Annotated[
    CoefficientSet | Annotated[tuple[Triple, ...], Field(strict=False)], BeforeValidator(_set_or_triples)
]
Sizes = Annotated[
    PositiveInt | Annotated[tuple[PositiveInt, ...], Field(strict=False)], BeforeValidator(_size_or_sizes)
]


class Split(Section):
    """Parameters that hold several matrices, one after the other (q, k and v, or heads), each computed by itself."""

    match: Regex
    sizes: Sizes
    """Rows of each block in order, or one number for blocks that all have as many (a head's width, say)."""
    dim: Literal[0, 1] = 0
    """1 counts columns: for modules that keep their weights as [in, out]."""


class MatrixGroup(Group):
    """What every group of matrices has."""

    momentum: Beta = 0.0
    """Of an average of gradients that the algorithm sees in their place; kept with the shard. 0 for none."""
    nesterov: bool = False
    lr_scale: LrScale = "none"
    """What the direction of a matrix [A, B] is multiplied by: original sqrt(max(1, A/B)), match_rms_adamw
    0.2 sqrt(max(A, B)), spectral sqrt(A/B)."""
    wire_dtype: Literal["auto", "parameter", "bf16"] = "auto"
    """In what matrices travel; auto is bf16 only where that changes no bit of the result."""
    split: Annotated[tuple[Split, ...], Field(strict=False)] = ()


class Muon(MatrixGroup):
    """Orthogonalised momentum (K. Jordan 2024, with the rate and decay of arXiv 2502.16982): AdamW's rate fits."""

    algorithm: Literal["muon"] = "muon"
    lr: PositiveFloat = 3e-4
    momentum: Beta = 0.95
    nesterov: bool = True
    lr_scale: LrScale = "match_rms_adamw"
    coefficients: Coefficients = "polar_express5"
    """A set by its name, or (a, b, c) for each iteration x <- a x + b x^3 + c x^5."""
    compute_dtype: Literal["auto", "parameter", "bf16", "fp32", "fp64"] = "auto"
    """Of Newton-Schulz; auto is bf16 on CUDA and the parameter's own elsewhere."""


class NorMuon(Muon):
    """Muon whose rows are brought to equal length by a running mean of their squares (arXiv 2510.05491)."""

    algorithm: Literal["normuon"] = "normuon"  # type: ignore[assignment]
    beta2: Beta = 0.95
    row_eps: PositiveFloat = 1e-10


class SOAP(MatrixGroup):
    """Adam in the slowly turning eigenbasis of Shampoo's factors (arXiv 2409.11321). The first step only looks."""

    algorithm: Literal["soap"] = "soap"
    looking_steps: ClassVar[int] = 1
    lr: PositiveFloat = 3e-3
    weight_decay: NonNegativeFloat = 0.01
    betas: Betas = (0.95, 0.95)
    eps: PositiveFloat = 1e-8
    every: PositiveInt = 10
    """Steps between refreshes of the bases."""
    max_dim: PositiveInt = 10_000
    """Longer sides are not rotated."""


class Shampoo(MatrixGroup):
    """Gradients between inverse fourth roots of averaged Gram matrices (arXiv 1802.09568), as long as Adam's step."""

    algorithm: Literal["shampoo"] = "shampoo"
    lr: PositiveFloat = 3e-4
    betas: Betas = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    ridge: PositiveFloat = 1e-6
    """Added to every eigenvalue, as a share of the largest."""
    every: PositiveInt = 100
    """Steps between new roots."""
    max_dim: PositiveInt = 10_000
    """Longer sides have no factor."""


class CustomMatrix(MatrixGroup):
    """Anybody's `update(matrix, state, **arguments) -> matrix`, as `package.module:name`; `arguments` go to it."""

    algorithm: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    arguments: dict[str, Any] = Field(default_factory=dict)


class ExchangeConfig(Section):
    """How matrices travel to the processes that compute them, for all groups of matrices together."""

    bucket_bytes: PositiveInt = 16 * 2**20
    """A bucket ends when a process sends as much of it (and has a matrix to compute): the next travels meanwhile."""
    replicas: Literal["auto", "replicate", "spread"] = "auto"
    """Where several processes hold the same shard: `replicate` computes once in each copy of the model, `spread` once
    in all, and the result travels between copies. auto takes the cheaper by the next two numbers."""
    flops_per_second: PositiveFloat | None = None
    """What one process computes in matrix products. Default: 4e14 on CUDA, 5e10 on a CPU."""
    bytes_per_second: PositiveFloat | None = None
    """What one process sends to another copy of the model. Default: 2.5e10 on CUDA, 1e9 on a CPU."""
    batched: bool = True
    """Compute matrices of one shape together; one by one gives the bits of one process."""
