"""Numbers and lists as the findings say them."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: float) -> str:
    """Bytes with three digits: 64.0 MB, 12.3 GB."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{_three(count / factor)} {unit}"
    return f"{count:.0f} B"


def rate(bytes_per_second: float) -> str:
    return f"{size(bytes_per_second)}/s"


def span(seconds: float) -> str:
    """A time with three digits: 85 µs, 12.3 ms, 4.2 s."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= factor:
            return f"{_three(seconds / factor)} {unit}"
    return "0 s"


def some(names: Sequence[str], shown: int = 4) -> str:
    """The first ones, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def _three(value: float) -> str:
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{decimals}f}"
