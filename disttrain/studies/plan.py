"""The plan of a comparison: its rows, grids, seeds and budget. Pure data, printed before anything starts, and stored.

Stage 1 searches rate and weight decay for every optimizer with equally many trials on one seed; stage 2 trains the best
of each on seeds that the search has not seen. Every trial is a whole run with a whole schedule over the budget.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Protocol = Literal["smoke", "small", "track3"]
Search = Literal["rate-first", "grid"]
Rule = Literal["none", "sqrt", "sqrt_full", "linear"]
BATCH_RULES: tuple[Rule, ...] = ("none", "sqrt", "sqrt_full", "linear")
BATCH_MULTIPLES = (4, 16)
FORMAT = 1


@dataclass(frozen=True)
class Rules:
    """What a protocol sets unless the command line says otherwise. `claims`: its verdicts need several seeds."""

    seeds: int
    rate_factors: tuple[float, ...]
    decay_factors: tuple[float, ...]
    evaluations: int
    claims: bool


PROTOCOLS: dict[Protocol, Rules] = {
    "smoke": Rules(2, (0.25, 1.0, 4.0), (0.0, 1.0), 4, claims=False),
    "small": Rules(3, (0.25, 0.5, 1.0, 2.0, 4.0), (0.1, 1.0, 10.0), 10, claims=True),
    "track3": Rules(5, (0.25, 0.5, 1.0, 2.0, 4.0), (0.1, 1.0, 10.0), 40, claims=True),
}


@dataclass(frozen=True)
class Row:
    """A line of the table. Rows of a larger batch search nothing: they take what their optimizer's first row found."""

    label: str
    optimizer: str
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    multiple: int = 1
    """The batch, in batches of the config."""
    rule: Rule | None = None
    """`schedule.batch_lr_rule`, where the batch is larger."""

    @property
    def searched(self) -> bool:
        return self.multiple == 1

    @property
    def middle_decay(self) -> float:
        """With which rates are tried first."""
        return self.decays[len(self.decays) // 2]


@dataclass(frozen=True, order=True)
class Cell:
    """One run: a row at a rate, a decay and a seed."""

    row: str
    rate: float
    decay: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder; one setting has one name in every comparison."""
        row = re.sub(r"[^A-Za-z0-9._-]+", "-", self.row)
        return f"{row}-lr{_short(self.rate)}-wd{_short(self.decay)}-seed{self.seed}".replace("+", "")

    def __str__(self) -> str:
        return f"{self.row}, lr {self.rate:g}, weight decay {self.decay:g}, seed {self.seed}"


def _short(value: float) -> str:
    """As people write it, unless other values would be written so too."""
    return short if float(short := f"{value:g}") == value else repr(value)


@dataclass(frozen=True)
class Plan:
    """`seeds` are those of stage 2; `ground` is what all cells have in common, as dotted keys of the config."""

    protocol: Protocol
    search: Search
    rows: tuple[Row, ...]
    tokens: int
    steps: int
    search_seed: int
    seeds: tuple[int, ...]
    target: float | None
    ground: dict[str, Any]

    @property
    def baseline(self) -> Row:
        return self.rows[0]

    @property
    def comparisons(self) -> int:
        """How many rows are compared with the baseline: their intervals hold together."""
        return max(len(self.rows) - 1, 1)

    def searched_row(self, row: Row) -> Row:
        """The row whose search `row` goes by."""
        return next(one for one in self.rows if one.searched and one.optimizer == row.optimizer)

    @property
    def trials(self) -> int:
        """Of every optimizer."""
        rates, decays = len(self.baseline.rates), len(self.baseline.decays)
        return rates * decays if self.search == "grid" else rates + decays - 1

    @property
    def search_cells(self) -> int:
        return self.trials * sum(row.searched for row in self.rows)

    @property
    def final_cells(self) -> int:
        return len(self.rows) * len(self.seeds)

    def stored(self) -> dict[str, Any]:
        cells = {"search": self.search_cells, "seeds": self.final_cells}
        return {"format": FORMAT, **asdict(self), "cells": cells}

    def lines(self) -> Iterator[str]:
        """The plan for people."""
        rule = "rate first, then weight decay at the best rate" if self.search == "rate-first" else "the whole grid"
        budget = f"{self.tokens:,} tokens ({self.steps:,} steps of the config's batch)"
        yield f"protocol {self.protocol}: every run has a whole schedule over {budget}"
        yield f"stage 1: {self.trials} trials for each optimizer on seed {self.search_seed}, {rule}"
        for row in self.rows:
            if row.searched:
                grids = (", ".join(f"{value:g}" for value in values) for values in (row.rates, row.decays))
                yield "  {}: lr {}; weight decay {}".format(row.label, *grids)
            else:
                yield f"  {row.label}: as {self.searched_row(row).label} at its best, batch_lr_rule = {row.rule}"
        few = len(self.seeds) <= 10
        seeds = ", ".join(map(str, self.seeds)) if few else f"{self.seeds[0]} to {self.seeds[-1]}"
        yield f"stage 2: the best of each on seeds {seeds}, against {self.baseline.label} seed by seed"
        total = self.search_cells + self.final_cells
        yield f"{total} runs: {self.search_cells} to search, {self.final_cells} to compare"


def plan_from(stored: dict[str, Any]) -> Plan:
    """What `stored` gave, from JSON; KeyError and TypeError for what is no plan."""
    rows = tuple(Row(**{**row, "rates": tuple(row["rates"]), "decays": tuple(row["decays"])}) for row in stored["rows"])
    plain = {key: stored[key] for key in ("protocol", "search", "tokens", "steps", "search_seed", "target", "ground")}
    return Plan(**plain, rows=rows, seeds=tuple(stored["seeds"]))


def growth_problems(before: Plan, now: Plan) -> list[str]:
    """Why `now` is another comparison than the one that a folder holds. It may grow: rows, grids and seeds may come."""
    keys = before.ground.keys() | now.ground.keys()
    problems = [
        f"{key} was {before.ground.get(key)!r}, is {now.ground.get(key)!r}"
        for key in sorted(keys)
        if before.ground.get(key) != now.ground.get(key)
    ]
    if before.tokens != now.tokens:
        problems.append(f"budgets differ: --tokens was {before.tokens:,}, is {now.tokens:,}")
    for name in ("search", "search_seed"):
        if getattr(before, name) != getattr(now, name):
            problems.append(f"{name} was {getattr(before, name)!r}, is {getattr(now, name)!r}")
    if before.baseline.label != now.baseline.label:
        problems.append(f"the baseline was {before.baseline.label}, is {now.baseline.label}")
    if gone := set(before.seeds) - set(now.seeds):
        problems.append(f"seeds {', '.join(map(str, sorted(gone)))} were planned and are gone")
    after = {row.label: row for row in now.rows}
    for row in before.rows:
        problems += _row_problems(row, after.get(row.label))
    return problems


def _row_problems(before: Row, now: Row | None) -> list[str]:
    if now is None:
        return [f"{before.label} was planned and is gone"]
    lost = {"rates": set(before.rates) - set(now.rates), "weight decays": set(before.decays) - set(now.decays)}
    return [
        f"{before.label}: {name} {', '.join(f'{value:g}' for value in sorted(values))} were planned and are gone"
        for name, values in lost.items()
        if values
    ]
