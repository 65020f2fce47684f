"""Every algorithm by the name that a config gives, and the union of their sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from disttrain.config.groups import (
    SGD,
    Adafactor,
    Adam,
    AdamW,
    AdEMAMix,
    Custom,
    Group,
    Lion,
    Momentum,
    Nesterov,
    RMSProp,
    ScheduleFreeAdamW,
)
from disttrain.config.matrix_groups import SOAP, CustomMatrix, Muon, NorMuon, Shampoo

ALGORITHMS: dict[str, type[Group]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "rmsprop": RMSProp,
    "adam": Adam,
    "adamw": AdamW,
    "lion": Lion,
    "ademamix": AdEMAMix,
    "adafactor": Adafactor,
    "schedule_free_adamw": ScheduleFreeAdamW,
    "muon": Muon,
    "normuon": NorMuon,
    "soap": SOAP,
    "shampoo": Shampoo,
}
"""A name with a dot is an optimizer class of the user's (`Custom`), with a colon a matrix function (`CustomMatrix`)."""

BY_TAG: dict[str, type[Group]] = {**ALGORITHMS, "custom": Custom, "custom_matrix": CustomMatrix}
"""As errors name the kinds of groups."""


def _tag(group: Any) -> str:
    name = group.get("algorithm", "adamw") if isinstance(group, dict) else group.algorithm
    if ":" in str(name):
        return "custom_matrix"
    return "custom" if "." in str(name) else str(name)


GroupConfig = Annotated[
    Annotated[SGD, Tag("sgd")]
    | Annotated[Momentum, Tag("momentum")]
    | Annotated[Nesterov, Tag("nesterov")]
    | Annotated[RMSProp, Tag("rmsprop")]
    | Annotated[Adam, Tag("adam")]
    | Annotated[AdamW, Tag("adamw")]
    | Annotated[Lion, Tag("lion")]
    | Annotated[AdEMAMix, Tag("ademamix")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[ScheduleFreeAdamW, Tag("schedule_free_adamw")]
    | Annotated[Muon, Tag("muon")]
    | Annotated[NorMuon, Tag("normuon")]
    | Annotated[SOAP, Tag("soap")]
    | Annotated[Shampoo, Tag("shampoo")]
    | Annotated[Custom, Tag("custom")]
    | Annotated[CustomMatrix, Tag("custom_matrix")],
    Discriminator(_tag),
]
