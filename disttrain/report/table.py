"""Rows of metrics as columns of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disttrain.report.curves import Curve, Floats

Row = dict[str, Any]
Mask = NDArray[np.bool_]
LARGEST = 1e36
"""Beyond the range of fp32, in which charts are drawn, a number is infinite; below its inverse it is zero."""
LAST_STEP = 2**31 - 1
_NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@dataclass(frozen=True)
class Column:
    """`values[i]` is that of row i; nan where `present[i]` is false."""

    values: Floats
    present: Mask


@dataclass(frozen=True)
class Table:
    """Rows of one kind, in the order of the file. `start_seconds` is the start of the run on its clock.

    `known_tokens`: steps and the tokens seen at them, for rows that say none.
    """

    rows: Sequence[Row]
    start_seconds: float
    known_tokens: tuple[Floats, Floats]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def step(self) -> Floats:
        return np.array([row["step"] for row in self.rows], dtype=float)

    @cached_property
    def tokens(self) -> Floats:
        own = self.column("tokens").values
        return np.where(np.isfinite(own), own, tokens_at(self.step, self.known_tokens))

    @cached_property
    def seconds(self) -> Floats:
        """Since the start of the run; nan where the row has no time."""
        clock = self.column("unix_seconds").values
        return np.where(np.isfinite(clock), clock, np.nan) - self.start_seconds

    def column(self, key: str) -> Column:
        found = [row.get(key) for row in self.rows]
        if not set(map(type, found)) <= {float, int, type(None)}:
            found = [number(value) for value in found]
        present = np.array([value is not None for value in found], dtype=bool)
        try:
            values = np.array(found, dtype=float)
        except OverflowError:
            values = np.array([number(value) for value in found], dtype=float)
        size = np.abs(values)
        values = np.where(size > LARGEST, np.copysign(np.inf, values), values)
        return Column(np.where(size < 1 / LARGEST, 0.0, values), present)

    def curve(self, key: str) -> Curve | None:
        """A column where it has a number; None without any."""
        column = self.column(key)
        return self.curve_of(column.values, column.present) if column.present.any() else None

    def curve_of(self, values: Floats, present: Mask) -> Curve:
        """Values of all rows that count where `present`."""
        return Curve(self.step[present], self.tokens[present], self.seconds[present], values[present])


def tokens_at(steps: Floats, known: tuple[Floats, Floats]) -> Floats:
    """Tokens seen at steps that may lie between two known ones; nan when none is known."""
    return np.interp(steps, *known) if len(known[0]) else np.full(len(steps), np.nan)


def number(value: Any) -> float | None:
    """A number of a JSON file; the words for what is not finite are numbers too."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        if abs(value) > LARGEST:
            return float("inf") if value > 0 else float("-inf")
        return float(value) if not abs(value) < 1 / LARGEST else 0.0
    return _NOT_FINITE.get(value) if isinstance(value, str) else None


def finite(value: Any) -> float | None:
    """A number that is finite, or None."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LAST_STEP
