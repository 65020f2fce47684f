"""The result in words and numbers: lines of a table, Markdown, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from disttrain.studies.plan import PROTOCOLS, Plan
from disttrain.studies.statistics import CONFIDENCE, Interval
from disttrain.studies.summary import RowResult

NOTHING = "–"


def header(plan: Plan) -> list[str]:
    columns = ["", "lr", "weight decay", "loss at the end", f"less {plan.baseline.label}", "verdict"]
    columns += ["tokens to its loss", "time to its loss", "state", "step time"]
    return columns + (["steps to target"] if plan.target is not None else [])


def cells(plan: Plan, result: RowResult) -> list[str]:
    """One line, as `header` has it."""
    best, is_baseline = result.best, result.row == plan.baseline
    shares = (result.tokens_to_baseline, time_to_baseline(result))
    line = [
        result.row.label,
        f"{best.rate:g}" if best else NOTHING,
        f"{best.decay:g}" if best else NOTHING,
        with_interval(result.loss),
        "the baseline" if is_baseline else _less(result),
        verdict(plan, result),
        *("1" if is_baseline else f"{share:.2f}" if share else "not reached" for share in shares),
        f"{result.state_bytes / 1e6:.2f} MB" if result.state_bytes is not None else NOTHING,
        step_time(result),
    ]
    return line + ([target(result)] if plan.target is not None else [])


def _less(result: RowResult) -> str:
    return with_interval(result.difference.interval if result.difference else None, signed=True)


def verdict(plan: Plan, result: RowResult) -> str:
    if result.row == plan.baseline:
        return NOTHING
    if not PROTOCOLS[plan.protocol].claims or result.difference is None:
        return "no verdict"
    if result.difference.interval.count < len(plan.seeds):
        return "no verdict"  # a seed that failed did so because of the optimizer, perhaps
    return result.difference.verdict


def time_to_baseline(result: RowResult) -> float | None:
    """A share of the baseline's time."""
    if result.tokens_to_baseline is None or result.step_ratio is None:
        return None
    return result.tokens_to_baseline * result.step_ratio


def with_interval(found: Interval | None, signed: bool = False) -> str:
    if found is None or not math.isfinite(found.mean):
        return NOTHING
    sign = "+" if signed else ""
    if found.low is None or found.high is None:
        return f"{found.mean:{sign}.4f}"
    return f"{found.mean:{sign}.4f} [{found.low:{sign}.4f}, {found.high:{sign}.4f}]"


def step_time(result: RowResult) -> str:
    if result.step_ratio is None:
        return NOTHING
    return f"{result.step_ratio:.2f}" + (" (noisy)" if result.noisy else "")


def target(result: RowResult) -> str:
    if result.steps_to_target is not None:
        return f"{result.steps_to_target:,}"
    return NOTHING if result.p_target is None else f"not reached (p {result.p_target:.2g})"


def notes(plan: Plan) -> list[str]:
    """How to read the table."""
    seeds = len(plan.seeds)
    together = f" for all {plan.comparisons} together (Bonferroni)" if plan.comparisons > 1 else ""
    lines = [
        f"{plan.tokens:,} tokens a run, a whole schedule each; {plan.trials} trials for every optimizer on seed "
        f"{plan.search_seed} ({'rates first, then decays' if plan.search == 'rate-first' else 'the whole grid'}), then "
        f"{seeds} other {'seed' if seeds == 1 else 'seeds'}. Losses are in nats a token of the validation text.",
        f"Brackets hold {CONFIDENCE:.0%} intervals over seeds: of a row's mean by itself; of the differences seed by "
        f"seed{together}, which the verdict goes by.",
        f"Tokens and time to its loss: after what share of {plan.baseline.label}'s the row is where that ends. Step "
        f"time is over {plan.baseline.label}'s; noisy: seeds differ by more than a twentieth.",
    ]
    if not PROTOCOLS[plan.protocol].claims:
        lines.append(f"Protocol {plan.protocol}: a check that everything runs, which claims nothing.")
    if plan.target is not None:
        lines.append(f"Steps to target: the mean over seeds is below {plan.target:g} from there on (p < 0.01).")
    return lines


def warnings(results: Sequence[RowResult]) -> list[str]:
    return [warning for result in results for warning in result.warnings]


def markdown(plan: Plan, results: Sequence[RowResult], command: str) -> str:
    columns = header(plan)
    lines = [f"`{command}`", "", _line(columns), "|" + "---|" * len(columns)]
    lines += [_line(cells(plan, result)) for result in results]
    lines += ["", *(f"{note}  " for note in notes(plan)), ""]
    lines += [f"- {warning}" for warning in warnings(results)]
    lines += ["", "Search ranges, and the loss of every trial:", "", *_searches(results)]
    return "\n".join(lines).rstrip() + "\n"


def _line(entries: Sequence[str]) -> str:
    return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |"


def _searches(results: Sequence[RowResult]) -> list[str]:
    lines = ["| | lr | weight decay | trials (lr, weight decay: loss) |", "|---|---|---|---|"]
    for result in results:
        if not result.row.searched:
            continue
        tried = "; ".join(
            f"{cell.rate:g}, {cell.decay:g}: {'failed' if loss is None else f'{loss:.4f}'}"
            for cell, loss in result.trials
        )
        grids = (", ".join(f"{value:g}" for value in values) for values in (result.row.rates, result.row.decays))
        lines.append(_line([result.row.label, *grids, tried]))
    return lines


def as_json(plan: Plan, results: Sequence[RowResult], command: str) -> str:
    said = [None if result.row == plan.baseline else verdict(plan, result) for result in results]
    rows = [_plain(asdict(result)) | {"verdict": word} for result, word in zip(results, said, strict=True)]
    about = {"command": command, "plan": plan.stored(), "notes": notes(plan), "warnings": warnings(results)}
    return json.dumps({**about, "rows": rows}, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no infinity: what is not finite is null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
