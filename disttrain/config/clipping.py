"""What may be done to gradients, updates and attention weights that grow too large.

Formulas and sources: docs/clipping.md, and the code in `disttrain.optim`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from disttrain.config.base import (
    Match,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Regex,
    Section,
)

MOST_IMPORTANT = 2.0
REST = "rest"
"""The unit of parameters that no rule matches."""

Importance = Annotated[float, Field(ge=1, le=MOST_IMPORTANT)]


class NoClip(Section):
    """The gradients stay as they are."""

    kind: Literal["none"] = "none"


class ClipValue(Section):
    """Every element is brought into [-limit, limit]."""

    kind: Literal["value"] = "value"
    limit: PositiveFloat


class ClipNorm(Section):
    """Gradients are scaled down where a norm exceeds `limit`: that of the group, or that of all groups together."""

    kind: Literal["norm"] = "norm"
    limit: PositiveFloat
    p: Annotated[float, Field(ge=1)] | Literal["inf"] = 2.0
    over: Literal["group", "all"] = "group"

    @property
    def order(self) -> float:
        return float(self.p)


class AGC(Section):
    """Each row is scaled down to `limit` times the norm of the weight's row (arXiv 2102.06171)."""

    kind: Literal["agc"] = "agc"
    limit: PositiveFloat = 0.01
    eps: PositiveFloat = 1e-3
    """The least norm that a row of weights counts as, so that rows of zeros can leave zero."""
    skip: Annotated[tuple[Regex, ...], Field(strict=False)] = ("role:head",)
    """Parameters that stay as they are, by rules as in `match`. A head tied to the embeddings has their role."""


class ZClip(Section):
    """A norm far above its running mean is brought down, the further the more (arXiv 2504.02507)."""

    kind: Literal["zclip"] = "zclip"
    z: PositiveFloat = 2.5
    """Standard deviations above the mean from which a norm is clipped."""
    decay: OpenFraction = 0.97
    warmup_steps: Annotated[int, Field(ge=2)] = 25
    """Steps whose norms give the first mean and deviation; only `max_norm` holds meanwhile."""
    max_norm: NonNegativeFloat | None = None
    """Besides, norms are brought down to this; 0 for no such limit. Default: `optim.clip_norm`."""
    over: Literal["group", "all"] = "all"


class UnitRule(Section):
    """Parameters that count as one kind: each kind is one unit in every layer."""

    name: Name
    match: Match
    importance: Importance = 1.0
    """Divides the distance between a unit's usual norm and its threshold: more important ones are held tighter."""


DEFAULT_UNITS = (
    UnitRule(name="attention_qk", match=("role:attention_qk",), importance=1.5),
    UnitRule(name="attention_vo", match=("role:attention_vo",)),
    UnitRule(name="mlp", match=("role:mlp",)),
    UnitRule(name="embeddings", match=("role:embeddings",), importance=1.25),
    UnitRule(name="head", match=("role:head",), importance=1.25),
    UnitRule(name="norms_biases", match=("role:norms", "role:biases")),
)


class AdaptiveClip(Section):
    """Per-group adaptive clipping: a unit (a kind of parameters in one layer) is scaled down when its norm leaves what
    is usual for it, and alone; loose early, strict late."""

    kind: Literal["adaptive"] = "adaptive"
    units: Annotated[tuple[UnitRule, ...], Field(strict=False)] = ()
    """Default: attention_qk 1.5, attention_vo, mlp, embeddings 1.25, head 1.25, norms_biases. What no rule matches is
    `rest`. No parameter may match two."""
    edge_importance: Importance = 1.0
    """Multiplies the importance in the first and the last layer; 2 is the most that both give together."""
    early: PositiveFloat = 4.0
    late: PositiveFloat = 2.5
    """Standard deviations of log-norms above their mean from which a unit is clipped, by half a cosine from `early`
    (until `tighten_from`) to `late` (from `tighten_until` on)."""
    tighten_from: NonNegativeInt = 0
    tighten_until: PositiveInt | None = None
    """Default: half of the run."""
    warmup_steps: Annotated[int, Field(ge=2)] = 100
    """Steps in which the statistics are only collected; `max_norm` holds from the start."""
    decay: OpenFraction = 0.98
    min_deviation: PositiveFloat = 0.05
    """The least standard deviation of log-norms that counts."""
    winsor: PositiveFloat = 4.0
    """A norm enters the statistics as at most this many deviations above the mean."""
    limit: PositiveFloat | None = None
    """The largest threshold, whatever the statistics say, from the start."""
    max_norm: NonNegativeFloat | None = None
    """On top: the norm of all gradients clipped this way together, as they are by then. 0 for no such limit. Default:
    `optim.clip_norm`."""

    @property
    def unit_rules(self) -> tuple[UnitRule, ...]:
        return self.units or DEFAULT_UNITS

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tighten_until is not None and self.tighten_until <= self.tighten_from:
            raise ValueError(
                f"tighten_until = {self.tighten_until} is not after tighten_from = {self.tighten_from}: the schedule "
                "would end before it begins; raise one or lower the other"
            )
        if self.late > self.early:
            raise ValueError(
                f"late = {self.late} is above early = {self.early}: thresholds go from loose to strict; swap them"
            )
        names = [rule.name for rule in self.units]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"units: the name {', '.join(twice)} is given twice; metrics go by these names")
        if REST in names:
            raise ValueError(f"units: {REST!r} is the name of what no rule matches; choose another")
        return self


Clip = Annotated[NoClip | ClipValue | ClipNorm | AGC | ZClip | AdaptiveClip, Field(discriminator="kind")]


class QKClipConfig(Section):
    """QK-Clip (arXiv 2507.20534): after a step, heads whose attention logits exceeded `threshold` have their query and
    key weights scaled back."""

    mode: Literal["off", "log", "clip"] | None = None
    """`log` measures and tells, and changes nothing. Default: clip under preset muonclip, else off."""
    threshold: PositiveFloat = 100.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How the factor is divided: its power `alpha` goes to the query, the rest to the key; all of it to the query under
    `q_only`."""
    grouped: Literal["q_only", "shared_k"] = "q_only"
    """Where several query heads share a key head: scale the queries alone, or the key too, by what all of them need."""
    logits: Literal["auto", "bound", "exact", "flex"] = "auto"
    """How the largest logit is found. bound: from the log-sum-exp of the kernel, too high by at most log(length) (CPU);
    flex: flex attention's own (CUDA); exact: by a second pass over queries and keys. auto: flex on CUDA, else bound."""
