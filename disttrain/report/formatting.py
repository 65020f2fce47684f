"""Numbers as people read them: sensible rounding, units always, n/a for what is unknown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

NA = "n/a"
Kind = Literal["plain", "count", "bytes", "seconds", "flops", "share"]

_STEPS: dict[Kind, tuple[tuple[float, str], ...]] = {
    "plain": ((1.0, ""),),
    "count": ((1.0, ""),),
    "share": ((0.01, "%"),),
    "bytes": ((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")),
    "seconds": ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days")),
    "flops": ((1.0, "FLOP/s"), (1e6, "MFLOP/s"), (1e9, "GFLOP/s"), (1e12, "TFLOP/s"), (1e15, "PFLOP/s")),
}


@dataclass(frozen=True)
class Scale:
    """What the values of a chart are divided by, and the unit that they then have."""

    factor: float
    unit: str


def scale(kind: Kind, values: Iterable[float]) -> Scale:
    """The largest unit in which the largest of `values` is at least one."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    largest, chosen = max(finite, default=0.0), _STEPS[kind][0]
    if not largest and kind == "seconds":
        return Scale(1.0, "s")
    for step in _STEPS[kind]:
        if largest >= step[0]:
            chosen = step
    return Scale(*chosen)


def time_scale(seconds: float) -> Scale:
    """The unit of a time axis that is `seconds` long: a few tens of ticks' worth of it."""
    for factor, unit, longest in ((1.0, "seconds", 300.0), (60.0, "minutes", 3 * 3600.0), (3600.0, "hours", 4 * 86400)):
        if seconds <= longest:
            return Scale(factor, unit)
    return Scale(86400.0, "days")


def significant(value: float | None, digits: int = 4) -> str:
    """Rounded to so many digits, with thousands separated: 0.01235, 12,350."""
    if value is None:
        return NA
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-4 or abs(value) >= 1e15):
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{round(value, decimals):,.{max(decimals, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def fixed(value: float | None, decimals: int = 4) -> str:
    """For losses, which are compared digit by digit."""
    return NA if value is None else f"{value:,.{decimals}f}"


def whole(value: float | None) -> str:
    if value is None:
        return NA
    return f"{value:,.0f}"


def short(value: float | None) -> str:
    """A count: whole below a million, then 1.23 M, 4.56 B, 7.89 T."""
    if value is None or not math.isfinite(value) or abs(value) < 999_500:
        return whole(value)
    for factor, unit in ((1e6, "M"), (1e9, "B"), (1e12, "T")):
        if abs(value) < factor * 999.5 or unit == "T":
            scaled = value / factor
            decimals = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:,.{decimals}f} {unit}"
    raise AssertionError("the last unit takes every value")


def percent(share: float | None) -> str:
    return NA if share is None else f"{100 * share:.1f}%"


def bytes_text(value: float | None) -> str:
    return _in_units("bytes", value)


def flops_text(value: float | None) -> str:
    """Operations per second."""
    return _in_units("flops", value)


def seconds_text(value: float | None) -> str:
    """Below two minutes one unit (12.3 s), above it two (4 min 5 s, 3 h 20 min, 2 d 4 h)."""
    if value is None or not math.isfinite(value) or abs(value) < 120:
        return _in_units("seconds", value)
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    for large, large_name, small, small_name in units:
        parts = round(value / small)
        if parts * small >= large:
            first, second = divmod(parts, large // small)
            return f"{first} {large_name} {second} {small_name}" if second else f"{first} {large_name}"
    return f"-{seconds_text(-value)}"


def _in_units(kind: Kind, value: float | None) -> str:
    if value is None:
        return NA
    if not math.isfinite(value):
        return str(value)
    chosen = scale(kind, [value])
    if kind == "seconds" and abs(value) >= 60:
        chosen = Scale(1.0, "s")
    return f"{significant(value / chosen.factor, 3)} {chosen.unit}"
