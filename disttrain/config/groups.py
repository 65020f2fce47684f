"""Groups of parameters: one frozen section for each algorithm that may own one, with defaults for language models.

Formulas and sources are with the code (`disttrain.optim`); names are those of `torch.optim`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_serializer

from disttrain.config.base import Match, Name, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section
from disttrain.config.clipping import Clip
from disttrain.config.schedule import GroupSchedule

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
StateDtype = Literal["parameter", "bf16", "int8"]


class Group(Section):
    """What every group has, whatever its algorithm."""

    name: Name
    match: Match
    """Regular expressions looked for anywhere in a parameter's name, or `role:NAME` of the model's plan."""
    clip: Clip | None = None
    """Default: `optim.clip`."""
    schedule: GroupSchedule | None = None
    """Where it differs from `[schedule]`."""
    algorithm: str
    lr: PositiveFloat
    """Peak rate; the schedule multiplies it."""
    weight_decay: NonNegativeFloat = 0.1
    looking_steps: ClassVar[int] = 0
    """Steps at the start in which nothing moves yet."""

    @model_serializer(mode="wrap")
    def _as_written(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Only what was said: a stored config must leave the rest to the settings that groups share."""
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}

    def describe(self) -> str:
        """The hyperparameters in one line."""
        skipped = ("name", "match", "clip", "schedule", "algorithm", "lr")
        values = {key: getattr(self, key) for key in type(self).model_fields if key not in skipped}
        said = [f"{key} {value}" for key, value in values.items() if value not in ((), {})]
        return f"lr {self.lr:g}, " + ", ".join(said)


class SGD(Group):
    """Plain gradient descent; `weight_decay` is added to the gradient (L2)."""

    algorithm: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.1
    weight_decay: NonNegativeFloat = 1e-4


class Momentum(SGD):
    """Heavy-ball momentum in torch's form: the buffer sums gradients, the rate multiplies the buffer."""

    algorithm: Literal["momentum"] = "momentum"  # type: ignore[assignment]
    momentum: Beta = 0.9
    state_dtype: StateDtype = "parameter"


class Nesterov(Momentum):
    """The gradient and one more step of the buffer (Sutskever et al. 2013, torch's form)."""

    algorithm: Literal["nesterov"] = "nesterov"  # type: ignore[assignment]


class RMSProp(Group):
    """Gradients over a running root mean square; `weight_decay` is added to the gradient (L2)."""

    algorithm: Literal["rmsprop"] = "rmsprop"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-4
    alpha: Beta = 0.99
    eps: PositiveFloat = 1e-8
    state_dtype: StateDtype = "parameter"


class Adam(Group):
    """Adam (arXiv 1412.6980) with coupled decay: `weight_decay` is added to the gradient (L2)."""

    algorithm: Literal["adam"] = "adam"
    lr: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 1e-4
    betas: Betas = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    state_dtype: StateDtype = "parameter"


class AdamW(Group):
    """Adam with decoupled decay (arXiv 1711.05101): the weight shrinks by rate times `weight_decay`."""

    algorithm: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 3e-4
    betas: Betas = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    state_dtype: StateDtype = "parameter"


class Lion(Group):
    """The sign of an interpolated momentum (arXiv 2302.06675); AdamW's rate through 3 to 10, its decay as much more."""

    algorithm: Literal["lion"] = "lion"
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.3
    betas: Betas = (0.9, 0.99)
    state_dtype: StateDtype = "parameter"


class AdEMAMix(Group):
    """AdamW with a second, slow average of gradients (arXiv 2409.03137).

    `alpha` weighs the slow average; it grows linearly over `alpha_warmup_steps`, and the slow average's half-life
    from that of the first beta to its own over `beta3_warmup_steps`; 0 means from the start.
    """

    algorithm: Literal["ademamix"] = "ademamix"
    lr: PositiveFloat = 3e-4
    betas: Annotated[tuple[Beta, Beta, Beta], Field(strict=False)] = (0.9, 0.999, 0.9999)
    alpha: NonNegativeFloat = 5.0
    alpha_warmup_steps: NonNegativeInt = 0
    beta3_warmup_steps: NonNegativeInt = 0
    eps: PositiveFloat = 1e-8
    state_dtype: StateDtype = "parameter"


class Adafactor(Group):
    """Row and column means in place of a second moment (arXiv 1804.04235).

    `lr` caps the relative step min(lr, 1/sqrt(t)), which the weight's root mean square multiplies (at least `eps2`).
    """

    algorithm: Literal["adafactor"] = "adafactor"
    lr: PositiveFloat = 1e-2
    weight_decay: NonNegativeFloat = 0.0
    beta2_decay: Annotated[float, Field(lt=0)] = -0.8
    eps1: PositiveFloat = 1e-30
    eps2: PositiveFloat = 1e-3
    clip_threshold: PositiveFloat = 1.0


class ScheduleFreeAdamW(Group):
    """AdamW that averages in place of a schedule (arXiv 2405.15682): trains at y, is used at the average x."""

    algorithm: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    lr: PositiveFloat = 2.5e-3
    weight_decay: NonNegativeFloat = 0.1
    betas: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Beta], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_power: NonNegativeFloat = 0.0
    """Step t has the weight t^weight_power in the average, times the square of the largest rate so far."""


class Custom(Group):
    """Any element-wise optimizer class by its dotted name; `arguments` go to it beside lr and weight_decay."""

    algorithm: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    arguments: dict[str, Any] = Field(default_factory=dict)
