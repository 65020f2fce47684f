"""How hyperparameters follow the batch: a batch k times as large, in tokens.

Derivations and sources: docs/batch-law.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Rule = Literal["none", "linear", "sqrt", "sqrt_full"]


@dataclass(frozen=True)
class Scaled:
    """Factors on a group's settings, and its new betas."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    betas: tuple[float, ...] | None = None
    """None where they stay."""


def scale_by_batch(
    rule: Rule, k: float, betas: tuple[float, ...] | None = None, keep_decay_timescale: bool = False
) -> Scaled:
    """What becomes of a group under `rule` when its batch is `k` times the one that it was tuned at.

    linear: lr k (SGD, arXiv 1706.02677). sqrt: lr sqrt(k). sqrt_full: lr sqrt(k), 1 - beta times k, eps over sqrt(k)
    (Adam as a stochastic differential equation, arXiv 2205.10287). The time scale of decoupled decay in tokens is
    batch / (lr weight_decay): to keep it, weight_decay takes what lr leaves of k. ValueError for a beta that would not
    stay positive.
    """
    lr = {"none": 1.0, "linear": k}.get(rule, math.sqrt(k))
    decay = k / lr if keep_decay_timescale and rule != "none" else 1.0
    if rule != "sqrt_full":
        return Scaled(lr=lr, weight_decay=decay)
    scaled = tuple(1.0 - k * (1.0 - beta) for beta in betas or ())
    if bad := [
        f"1 - {k:g} (1 - {beta:g}) = {new:g}" for beta, new in zip(betas or (), scaled, strict=True) if new < 1e-9
    ]:
        raise ValueError(
            f"sqrt_full: a batch {k:g} times as large needs beta = {bad[0]}, which forgets everything in a step; use "
            "the rule 'sqrt', or a base batch nearer to this one"
        )
    return Scaled(lr=lr, weight_decay=decay, eps=1.0 / math.sqrt(k), betas=scaled or None)
