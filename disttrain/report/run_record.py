"""What one run left, as the report uses it. Everything but the metrics may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.report.curves import Curve, Floats
from disttrain.report.table import Row, Table, finite, is_step, number, tokens_at


@dataclass(frozen=True)
class Event:
    """Something that happened; `seconds` since the start of the run."""

    seconds: float
    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class RunRecord:
    """What one run left; `notes` say in words what could not be read."""

    folder: Path
    label: str
    config: dict[str, Any]
    rows: list[Row]
    status: dict[str, Any] = field(default_factory=dict)
    ownership: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    raw_events: list[Row] = field(default_factory=list)
    samples: list[tuple[int, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @cached_property
    def log(self) -> Table:
        return self._table("loss")

    @cached_property
    def validations(self) -> Table:
        return self._table("validation_loss")

    @cached_property
    def checkpoints(self) -> Table:
        return self._table("checkpoint_bytes")

    def _table(self, mark: str) -> Table:
        """The rows that have the column `mark`."""
        return Table([row for row in self.rows if mark in row], self.start_seconds or 0.0, self._known_tokens)

    @cached_property
    def _known_tokens(self) -> tuple[Floats, Floats]:
        counts = [(row["step"], finite(row.get("tokens"))) for row in self.rows]
        known = sorted((step, tokens) for step, tokens in counts if tokens is not None)
        columns = np.array(known, dtype=float).reshape(-1, 2)
        return columns[:, 0], columns[:, 1]

    @cached_property
    def times(self) -> list[float]:
        """Of the clock (Unix), of every row that has one."""
        return [time for row in self.rows if (time := finite(row.get("unix_seconds"))) is not None]

    @cached_property
    def start_seconds(self) -> float | None:
        """Of the clock, at the first thing that carries a time; None when nothing does."""
        events = [time for row in self.raw_events if (time := finite(row.get("unix_seconds"))) is not None]
        return min((*self.times, *events), default=None)

    @property
    def has_time(self) -> bool:
        return bool(self.times)

    @cached_property
    def events(self) -> list[Event]:
        start = self.start_seconds or 0.0
        found = []
        for row in self.raw_events:
            time = finite(row.get("unix_seconds"))
            if time is not None and is_step(row.get("step")):
                found.append(Event(time - start, row["step"], str(row.get("kind", "")), str(row.get("text", ""))))
        return found

    @cached_property
    def keys(self) -> list[str]:
        """Every column of the log rows, in the order of appearance."""
        seen: dict[str, None] = {}
        for row in self.log.rows:
            if not row.keys() <= seen.keys():
                seen |= dict.fromkeys(row)
        return list(seen)

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix/` in the columns: groups, units, layers or ranks."""
        return [key.removeprefix(f"{prefix}/") for key in self.keys if key.startswith(f"{prefix}/")]

    def curve(self, key: str) -> Curve | None:
        """One column of the log rows where it has a number; None without any."""
        return self.log.curve(key)

    def tokens_at(self, steps: Floats) -> Floats:
        return tokens_at(steps, self._known_tokens)

    def last(self, key: str) -> float | None:
        """The newest value of a column."""
        values = (number(row.get(key)) for row in reversed(self.log.rows))
        return next((value for value in values if value is not None), None)

    def setting(self, path: str) -> Any:
        """A value of the config by its dotted path; None when there is none."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def names_of_all(runs: Sequence[RunRecord], prefix: str) -> list[str]:
    """The groups, units, layers or ranks of any of the runs."""
    return list(dict.fromkeys(name for run in runs for name in run.names(prefix)))
