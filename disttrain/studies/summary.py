"""From the outcomes of runs to what the table says. Pure; the same runs give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from disttrain.studies.outcomes import Outcome
from disttrain.studies.plan import Cell, Plan, Row
from disttrain.studies.stages import Setting, best_setting, edge_warnings, final_cells, trials
from disttrain.studies.statistics import REACHED_P, Difference, Interval, difference, interval, p_below

NOISY_SHARE = 0.05
"""A ratio of times that differs by more than this share between seeds is marked."""
Curve = tuple[tuple[int, float], ...]
"""Tokens, and the mean over seeds of the validation loss there."""


@dataclass(frozen=True)
class RowResult:
    """One line; None where it is not known (yet), or never was reached."""

    row: Row
    trials: tuple[tuple[Cell, float | None], ...]
    best: Setting | None
    warnings: tuple[str, ...]
    losses: dict[int, float]
    """At the end, by seed."""
    loss: Interval | None
    difference: Difference | None
    tokens_to_baseline: float | None
    """Where every seed has come to the loss at which the baseline ends on that seed: a share of the budget."""
    state_bytes: int | None
    step_ratio: float | None
    """Time of a step over the baseline's."""
    noisy: bool
    steps_to_target: int | None
    p_target: float | None
    curve: Curve


def summarise(plan: Plan, outcomes: Mapping[Cell, Outcome], failed: Collection[Cell] = ()) -> list[RowResult]:
    """A result for every row of the plan, in its order."""
    losses = {cell: outcome.loss for cell, outcome in outcomes.items()} | dict.fromkeys(failed, math.inf)
    finals = {row.label: _finals(plan, row, losses, outcomes) for row in plan.rows}
    baseline = finals[plan.baseline.label]
    return [_row_result(plan, row, losses, finals[row.label], baseline) for row in plan.rows]


def _finals(plan: Plan, row: Row, losses: Mapping[Cell, float], outcomes: Mapping[Cell, Outcome]) -> dict[int, Outcome]:
    """The runs of stage 2 that ended, by seed."""
    return {cell.seed: outcomes[cell] for cell in final_cells(plan, row, losses) if cell in outcomes}


def _row_result(
    plan: Plan,
    row: Row,
    losses: Mapping[Cell, float],
    finals: Mapping[int, Outcome],
    baseline: Mapping[int, Outcome],
) -> RowResult:
    ends = {seed: outcome.loss for seed, outcome in finals.items()}
    base_ends = {seed: outcome.loss for seed, outcome in baseline.items()}
    searched = trials(plan, row, losses) if row.searched else []
    ratio, noisy = step_ratio(finals, baseline)
    steps, p = steps_to_target(finals, plan.target)
    return RowResult(
        row=row,
        trials=tuple((cell, _finite(losses.get(cell))) for cell in searched),
        best=best_setting(plan, row, losses),
        warnings=tuple(edge_warnings(plan, row, losses) + _untried(searched, losses) + _missing(plan, row, finals)),
        losses=ends,
        loss=interval(list(ends.values())) if ends else None,
        difference=None if row == plan.baseline else difference(ends, base_ends, plan.comparisons),
        tokens_to_baseline=None if row == plan.baseline else tokens_to_baseline(finals, baseline, plan.tokens),
        state_bytes=next((outcome.state_bytes for outcome in finals.values()), None),
        step_ratio=ratio,
        noisy=noisy,
        steps_to_target=steps,
        p_target=p,
        curve=mean_curve(list(finals.values())),
    )


def _untried(searched: Sequence[Cell], losses: Mapping[Cell, float]) -> list[str]:
    """A trial that diverged is a finding, one that was killed is none; which it was stands in its log."""
    found = [cell for cell in searched if losses.get(cell) == math.inf]
    if not found:
        return []
    trials = "; ".join(f"lr {cell.rate:g}, weight decay {cell.decay:g}" for cell in found)
    return [f"{found[0].row}: counted as worse than any other, since they have no loss: {trials}; see their logs"]


def _missing(plan: Plan, row: Row, finals: Mapping[int, Outcome]) -> list[str]:
    gone = [str(seed) for seed in plan.seeds if seed not in finals]
    wild = [str(seed) for seed, outcome in finals.items() if not math.isfinite(outcome.loss)]
    found = [f"{row.label}: no result for seed {', '.join(gone)}; the next call tries again"] if gone else []
    if wild:
        found.append(f"{row.label}: the loss at the end is not finite for seed {', '.join(wild)}: no mean, no verdict")
    return found


def tokens_to_baseline(finals: Mapping[int, Outcome], baseline: Mapping[int, Outcome], budget: int) -> float | None:
    """The mean over seeds of the share of the budget after which a run is where the baseline of its seed ends.

    None when a seed never gets there. Losses in the middle of a decaying schedule are higher than those of a shorter
    run with a schedule of its own, so that this is an upper bound.
    """
    seeds = sorted(finals.keys() & baseline.keys())
    if not all(math.isfinite(baseline[seed].loss) for seed in seeds):
        return None
    shares = [_reached(finals[seed], baseline[seed].loss) for seed in seeds]
    if not shares or any(share is None for share in shares):
        return None
    return fmean(share for share in shares if share is not None) / budget


def _reached(outcome: Outcome, level: float) -> float | None:
    """Tokens at which the loss first comes down to `level`, between evaluations by a straight line."""
    points = [(tokens, loss) for tokens, _, loss in outcome.curve]
    if points[0][1] <= level:
        return points[0][0]
    for (before, high), (after, low) in pairwise(points):
        if low <= level < high:
            share = (high - level) / (high - low) if math.isfinite(high) else 1.0
            return before + (after - before) * share
    return None


def step_ratio(finals: Mapping[int, Outcome], baseline: Mapping[int, Outcome]) -> tuple[float | None, bool]:
    """Time of a step over the baseline's, the mean over seeds, and whether seeds disagree on it."""
    both = [(finals[seed].step_over_model, baseline[seed].step_over_model) for seed in finals.keys() & baseline.keys()]
    ratios = [theirs / ours for theirs, ours in both if theirs and ours]
    if not ratios:
        return None, False
    mean = fmean(ratios)
    return mean, max(ratios) - min(ratios) > NOISY_SHARE * mean


def steps_to_target(finals: Mapping[int, Outcome], target: float | None) -> tuple[int | None, float | None]:
    """The first evaluated step from which on the mean over seeds is below the target, each time with p below 0.01; and
    p at the end."""
    if target is None or len(finals) < 2:
        return None, None
    found = None
    columns = zip(*(outcome.curve for outcome in finals.values()), strict=True)
    p = None
    for column in columns:
        p = p_below([loss for _, _, loss in column], target) if all(math.isfinite(c[2]) for c in column) else 1.0
        reached = p is not None and p < REACHED_P
        found = (found or column[0][1]) if reached else None
    return found, p


def mean_curve(outcomes: Sequence[Outcome]) -> Curve:
    columns: dict[int, list[float]] = {}
    for outcome in outcomes:
        for tokens, _, loss in outcome.curve:
            columns.setdefault(tokens, []).append(loss)
    whole = ((tokens, fmean(found)) for tokens, found in sorted(columns.items()) if len(found) == len(outcomes))
    return tuple((tokens, loss) for tokens, loss in whole if math.isfinite(loss))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
