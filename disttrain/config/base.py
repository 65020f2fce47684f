"""What every settings section has in common."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen table of settings: unknown keys, wrong types, NaN and infinities are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


def _not_empty(rules: tuple[str, ...]) -> tuple[str, ...]:
    if not rules:
        raise ValueError("must have at least one rule; ['.*'] matches every parameter")
    return rules


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Regex = Annotated[str, AfterValidator(_compiles)]
Match = Annotated[tuple[Regex, ...], Field(strict=False), AfterValidator(_not_empty)]
"""Regular expressions looked for anywhere in a parameter's name, or `role:NAME` of the model's plan."""
