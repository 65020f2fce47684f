"""The optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from disttrain.config.algorithms import ALGORITHMS, GroupConfig
from disttrain.config.base import NonNegativeFloat, PositiveFloat, Section
from disttrain.config.clipping import AdaptiveClip, Clip, ClipNorm, NoClip, QKClipConfig, ZClip
from disttrain.config.groups import Beta, Group, ScheduleFreeAdamW, StateDtype
from disttrain.config.matrix_groups import ExchangeConfig, MatrixGroup

Preset = Literal[
    "sgd",
    "momentum",
    "nesterov",
    "rmsprop",
    "adam",
    "adamw",
    "lion",
    "ademamix",
    "adafactor",
    "schedule_free_adamw",
    "muon",
    "muonclip",
    "normuon",
    "soap",
    "shampoo",
]
SHARED = ("lr", "weight_decay", "betas", "eps", "state_dtype")
_NOT_DECAYED = ("role:embeddings", "role:norms", "role:biases")


def _two_or_three(betas: tuple[float, ...]) -> tuple[float, ...]:
    if len(betas) not in (2, 3):
        raise ValueError(f"must be two numbers, or three where the algorithm has as many; not {len(betas)}")
    return betas


class OptimConfig(Section):
    """Ordered groups of parameters, each with its algorithm, rate and clipping.

    Without `groups`, the preset's: embeddings, norms and biases are not decayed, the rest is.
    """

    preset: Preset = "adamw"
    """One algorithm for everything, or, for those that need matrices, for the hidden matrices, with adamw for the rest;
    `groups` take their place. muonclip: muon, with `clip` adaptive and `qk_clip` on unless they say otherwise."""
    lr: PositiveFloat | None = None
    """Peak learning rate; the schedule multiplies it. This and the next four hold for groups that do not say their own;
    where nothing is said, the algorithm's default holds."""
    weight_decay: NonNegativeFloat | None = None
    betas: Annotated[tuple[Beta, ...], Field(strict=False), AfterValidator(_two_or_three)] | None = None
    eps: PositiveFloat | None = None
    state_dtype: StateDtype | None = None
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of all gradients together; longer gradients are scaled down to it, 0 for no such limit. Where a
    `clip` says something else, this is only the default of its `max_norm`."""
    clip: Clip | None = None
    """How groups are clipped that do not say. Default: by the norm of all gradients together, at `clip_norm`."""
    max_update_ratio: PositiveFloat | None = None
    """No step moves a parameter by more than this times its own norm. Default: no limit."""
    qk_clip: QKClipConfig = Field(default_factory=QKClipConfig)
    groups: Annotated[tuple[GroupConfig, ...], Field(strict=False)] = ()
    """First match wins; every rule must match, and every parameter must be matched."""
    exchange: ExchangeConfig = Field(default_factory=ExchangeConfig)

    @property
    def resolved_groups(self) -> tuple[Group, ...]:
        """The groups with everything filled in: their own settings, else the shared ones, else the defaults."""
        groups = self.groups or _preset_groups(self.preset)
        return tuple(
            group.model_copy(update={"clip": self._resolved_clip(group.clip)})
            for group in map(self._with_shared, groups)
        )

    @property
    def resolved_qk_clip(self) -> QKClipConfig:
        """With its mode filled in."""
        mode = self.qk_clip.mode or ("clip" if self.preset == "muonclip" else "off")
        return self.qk_clip.model_copy(update={"mode": mode})

    def _resolved_clip(self, own: Clip | None) -> Clip:
        clip = own or self.clip
        if clip is None and self.preset == "muonclip":
            clip = AdaptiveClip()
        if clip is None:
            return ClipNorm(limit=self.clip_norm, over="all") if self.clip_norm else NoClip()
        if isinstance(clip, AdaptiveClip | ZClip) and clip.max_norm is None:
            return clip.model_copy(update={"max_norm": self.clip_norm})
        return clip

    def _with_shared(self, group: Group) -> Group:
        own, fields = group.model_fields_set, type(group).model_fields
        shared = {key: getattr(self, key) for key in SHARED if key in fields and key not in own}
        said = {key: value for key, value in shared.items() if value is not None}
        if "betas" in said and len(said["betas"]) != (takes := len(fields["betas"].default)):
            raise ValueError(f"betas: {group.algorithm} takes {takes}, not {len(said['betas'])}")
        return type(group).model_validate({**{key: getattr(group, key) for key in own}, **said})

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        names = [group.name for group in self.groups]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"groups: the name {', '.join(sorted(twice))} is given twice; metrics go by these names")
        groups = self.resolved_groups
        for key in SHARED:
            if getattr(self, key) is not None and not any(key in type(group).model_fields for group in groups):
                algorithms = ", ".join(sorted({group.algorithm for group in groups}))
                raise ValueError(f"{key}: {algorithms} has no such setting; leave it out")
        if self.max_update_ratio and any(isinstance(group, ScheduleFreeAdamW) for group in groups):
            raise ValueError("max_update_ratio: schedule_free_adamw averages its points, not its steps; leave it out")
        return self


def _preset_groups(preset: str) -> tuple[Group, ...]:
    preset = "muon" if preset == "muonclip" else preset
    section, rest = ALGORITHMS[preset], preset
    matrices: tuple[Group, ...] = ()
    if issubclass(section, MatrixGroup):
        matrices = (section.model_validate({"name": "matrices", "match": ("role:matrices",), "algorithm": preset}),)
        section, rest = ALGORITHMS["adamw"], "adamw"
    return (
        *matrices,
        section.model_validate({"name": "no_decay", "match": _NOT_DECAYED, "algorithm": rest, "weight_decay": 0.0}),
        section.model_validate({"name": "decay", "match": (".*",), "algorithm": rest}),
    )
