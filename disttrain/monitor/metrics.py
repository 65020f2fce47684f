"""Metrics stay on the device until a log step, then cross the ranks in one collective."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from disttrain.distributed.collectives import dist_all_gather_rows
from disttrain.monitor.record import Histogram

Held = list[Tensor | float]
_EMPTY: dict[str, list[float]] = {"sum": [0.0], "max": [-math.inf], "mean": [0.0, 0.0]}


@dataclass(frozen=True)
class Bins:
    """A histogram in equal steps of the logarithm; what lies outside goes into the first or last bin."""

    low: float
    high: float
    per_decade: int

    @property
    def edges(self) -> list[float]:
        count = round(math.log10(self.high / self.low) * self.per_decade)
        return [self.low * 10 ** (index / self.per_decade) for index in range(count + 1)]


@dataclass(frozen=True)
class Last:
    """The last `count` numbers of each rank."""

    count: int


Reduction = Literal["sum", "max", "mean"] | Bins | Last


@dataclass(frozen=True)
class Reduced:
    """What all ranks have added since the last time."""

    values: dict[str, float]
    histograms: dict[str, Histogram]
    columns: dict[str, tuple[Tensor, str]]
    """What each rank has added, [ranks, parts], and its reduction."""

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def by_rank(self, name: str) -> list[float]:
        """The value before ranks were put together, in the order of ranks."""
        rows, kind = self.columns[name]
        found: list[float] = (rows[:, 0] / rows[:, 1] if kind == "mean" else rows[:, 0]).tolist()
        return found

    def last(self, name: str) -> list[list[float]]:
        """[numbers][ranks], oldest first, of a `Last`."""
        rows, _ = self.columns[name]
        return [column for column in rows.T.tolist() if not any(math.isnan(number) for number in column)]


class MetricBuffer:
    """Metrics with a declared reduction, gathered over calls of `add` and over ranks; equal names on all ranks.

    A mean is kept as total and weight (tokens, steps, elements), so that ranks with less to say have less of a say: a
    mean of means is never formed. Without any weight it is NaN.
    """

    def __init__(self, reductions: Mapping[str, Reduction], device: torch.device) -> None:
        self.reductions = dict(reductions)
        self.device = device
        self._bins = {name: kind for name, kind in self.reductions.items() if isinstance(kind, Bins)}
        self._inner = {
            name: torch.tensor(bins.edges[1:-1], dtype=torch.float64, device=device)
            for name, bins in self._bins.items()
        }
        self.clear()

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Fold in one more value, without asking the device for it. KeyError for a name that was not declared.

        Of a mean, `value` is the total over `weight` things; of a histogram or of the last ones, any number of values.
        """
        kind = self.reductions[name]
        if isinstance(kind, Bins):
            self._counts[name] += self._count(name, value)
            return
        if isinstance(kind, Last):
            self._lasts[name].extend(torch.as_tensor(value).flatten().tolist())
            return
        held = self._held[name]
        if kind == "max":
            held[0] = _maximum(held[0], _double(value))
        else:
            held[0] = held[0] + _double(value)
        if kind == "mean":
            held[1] = held[1] + _double(weight)

    def reduce(self) -> Reduced:
        """Everything over all ranks since the last call, and start anew. Collective; the one wait for the device."""
        scalars = [torch.as_tensor(part, device=self.device).double() for held in self._held.values() for part in held]
        parts = [torch.stack(scalars)] if scalars else []
        parts += [*self._counts.values(), *(_padded(last).to(self.device) for last in self._lasts.values())]
        rows = dist_all_gather_rows(torch.cat(parts)).cpu()
        widths = [*map(len, self._held.values()), *map(len, self._counts.values())]
        widths += [last.maxlen or 0 for last in self._lasts.values()]
        columns = dict(zip([*self._held, *self._counts, *self._lasts], rows.split(widths, dim=1), strict=True))
        kinds = {name: str(self.reductions[name]) for name in self._held}
        values = {name: _over_ranks(columns[name], kind) for name, kind in kinds.items()}
        histograms = {
            name: Histogram.trimmed(bins.edges, columns[name].sum(0).long().tolist())
            for name, bins in self._bins.items()
        }
        self.clear()
        kinds |= dict.fromkeys(self._lasts, "last")
        return Reduced(values, histograms, {name: (columns[name], kind) for name, kind in kinds.items()})

    def _count(self, name: str, value: Tensor | float) -> Tensor:
        values = torch.as_tensor(value, device=self.device).detach().double().reshape(-1, 1)
        bins = torch.bucketize(values, self._inner[name], right=True)
        places = torch.arange(len(self._inner[name]) + 1, device=self.device)
        # Not bincount, which would wait for the device.
        return (bins == places).sum(0, dtype=torch.float64)

    def clear(self) -> None:
        """Start anew."""
        self._held: dict[str, Held] = {
            name: list(_EMPTY[kind]) for name, kind in self.reductions.items() if isinstance(kind, str)
        }
        self._lasts: dict[str, deque[float]] = {
            name: deque(maxlen=kind.count) for name, kind in self.reductions.items() if isinstance(kind, Last)
        }
        self._counts = {
            name: torch.zeros(len(inner) + 1, dtype=torch.float64, device=self.device)
            for name, inner in self._inner.items()
        }


def _padded(numbers: deque[float]) -> Tensor:
    """As many numbers as there may be, NaN before the first."""
    return torch.tensor([math.nan] * ((numbers.maxlen or 0) - len(numbers)) + [*numbers], dtype=torch.float64)


def _double(value: Tensor | float) -> Tensor | float:
    """Numbers of the host stay there: moving each to a device would cost more than adding it."""
    return value.detach().double() if isinstance(value, Tensor) else float(value)


def _maximum(held: Tensor | float, value: Tensor | float) -> Tensor | float:
    if not isinstance(held, Tensor) and not isinstance(value, Tensor):
        return max(held, value) if not math.isnan(value) else value
    device = held.device if isinstance(held, Tensor) else value.device if isinstance(value, Tensor) else None
    return torch.maximum(*(torch.as_tensor(one, device=device).double() for one in (held, value)))


def _over_ranks(rows: Tensor, kind: str) -> float:
    """`rows` [ranks, 1], or [ranks, 2] of totals and weights."""
    if kind == "max":
        return float(rows[:, 0].max())
    total = rows.sum(0)
    return float(total[0] if kind == "sum" else total[0] / total[1])
