"""Which runs come next, from the plan and what is known so far. Pure: every machine that asks gets the same answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from disttrain.studies.plan import Cell, Plan, Row

Losses = Mapping[Cell, float]
"""Final validation losses of the runs that have ended; one that failed has an infinite one."""


@dataclass(frozen=True)
class Setting:
    """A rate and a decay, and the loss that they had in the search."""

    rate: float
    decay: float
    loss: float


def rate_trials(plan: Plan, row: Row) -> list[Cell]:
    """Known from the start: all rates at the middle decay, or the whole grid."""
    decays = row.decays if plan.search == "grid" else (row.middle_decay,)
    return [Cell(row.label, rate, decay, plan.search_seed) for decay in decays for rate in row.rates]


def decay_trials(plan: Plan, row: Row, losses: Losses) -> list[Cell]:
    """The other decays at the best rate; none in a whole grid, or while the best rate is not known."""
    if plan.search == "grid" or (rate := _best(rate_trials(plan, row), losses)) is None:
        return []
    decays = (decay for decay in row.decays if decay != row.middle_decay)
    return [Cell(row.label, rate.rate, decay, plan.search_seed) for decay in decays]


def trials(plan: Plan, row: Row, losses: Losses) -> list[Cell]:
    return rate_trials(plan, row) + decay_trials(plan, row, losses)


def best_setting(plan: Plan, row: Row, losses: Losses) -> Setting | None:
    """What the search has found; None before its end, and where every trial failed."""
    return _best(trials(plan, plan.searched_row(row), losses), losses)


def final_cells(plan: Plan, row: Row, losses: Losses) -> list[Cell]:
    best = best_setting(plan, row, losses)
    if best is None:
        return []
    return [Cell(row.label, best.rate, best.decay, seed) for seed in plan.seeds]


def stages(plan: Plan, losses: Losses) -> list[list[Cell]]:
    """Rates, decays, seeds: what each has as far as it is known. Rows take turns, so that all bear a busy hour."""
    searched = [row for row in plan.rows if row.searched]
    return [
        _in_turns([rate_trials(plan, row) for row in searched]),
        _in_turns([decay_trials(plan, row, losses) for row in searched]),
        _in_turns([final_cells(plan, row, losses) for row in plan.rows]),
    ]


def edge_warnings(plan: Plan, row: Row, losses: Losses) -> list[str]:
    """What the search cannot know: whether the optimum lies beyond its grid. Below a decay of 0 there is nothing."""
    best = best_setting(plan, row, losses)
    if best is None or not row.searched:
        return []
    tried = trials(plan, row, losses)
    decay = best.decay if plan.search == "grid" else row.middle_decay
    rates = {cell.rate: losses[cell] for cell in tried if cell.decay == decay}
    decays = {cell.decay: losses[cell] for cell in tried if cell.rate == best.rate}
    found = _at_edge("lr", best.rate, row.rates, rates), _at_edge("weight decay", best.decay, row.decays, decays)
    return [f"{row.label}: {warning}" for warning in found if warning]


def _at_edge(name: str, value: float, grid: tuple[float, ...], losses: Mapping[float, float]) -> str:
    """A warning, with what the edge is ahead of the value beside it; "" inside the grid, and at 0."""
    at_low_end = value == grid[0] and value > 0
    if not at_low_end and value != grid[-1]:
        return ""
    side, neighbour = ("smallest", grid[1]) if at_low_end else ("largest", grid[-2])
    lead = losses[neighbour] - losses[value]
    ahead = f"{lead:.4f} ahead of {neighbour:g}" if math.isfinite(lead) else f"and {neighbour:g} failed"
    return (
        f"the best {name} {value:g} is the {side} of its grid, {ahead}: the optimum may lie beyond, and the row may be "
        "better than shown; widen the grid"
    )


def _best(cells: list[Cell], losses: Losses) -> Setting | None:
    """None unless all of them have ended and one did not fail. Of equals the smaller rate."""
    if not all(cell in losses for cell in cells):
        return None
    settings = [Setting(cell.rate, cell.decay, losses[cell]) for cell in cells if math.isfinite(losses[cell])]
    return min(settings, key=lambda one: (one.loss, one.rate, one.decay), default=None)


def _in_turns(groups: list[list[Cell]]) -> list[Cell]:
    longest = max(map(len, groups), default=0)
    return [group[place] for place in range(longest) for group in groups if place < len(group)]
