"""The numbers at the top: what a run came to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from disttrain.report import formatting as f
from disttrain.report.chart import colour_of
from disttrain.report.health_charts import lost_time
from disttrain.report.html_tables import by_run, text
from disttrain.report.run_record import RunRecord
from disttrain.report.table import finite, number

KNOWN_STATES = ("completed", "running", "preempted", "failed")


@dataclass(frozen=True)
class Fact:
    """A number in words, and what stands in small letters below it."""

    name: str
    value: str
    note: str = ""


def state(run: RunRecord) -> str:
    return str(run.status.get("state", "unknown"))


def wall_seconds(run: RunRecord) -> float | None:
    """Of status.json; of a run that goes on, and of an old one, from the first to the last row."""
    known = finite(run.status.get("wall_seconds"))
    if known is not None and state(run) != "running":
        return known
    return max(run.times) - min(run.times) if len(run.times) > 1 else None


def facts(run: RunRecord) -> list[Fact]:
    """The same ones for every run, n/a where unknown."""
    return [fact(run) for fact in (_step, _tokens, _loss, _validation, _speed, _mfu, _goodput, _wall)]


def tiles(run: RunRecord) -> str:
    cells = [
        f"<div><dt>{text(fact.name)}</dt><dd>{text(fact.value)}</dd>"
        + (f"<small>{text(fact.note)}</small>" if fact.note else "")
        + "</div>"
        for fact in facts(run)
    ]
    return '<dl class="tiles">' + "".join(cells) + "</dl>"


def pill(run: RunRecord) -> str:
    known = state(run) if state(run) in KNOWN_STATES else "unknown"
    return f'<span class="pill {known}">{text(state(run))}</span>'


def comparison(runs: Sequence[RunRecord]) -> str:
    """All runs side by side."""
    of_runs = [facts(run) for run in runs]
    rows: list[tuple[str, Sequence[object]]] = [("State", [state(run) for run in runs])]
    for position, fact in enumerate(of_runs[0]):
        rows.append((fact.name, [_cell(found[position]) for found in of_runs]))
    more: tuple[tuple[str, Callable[[RunRecord], str]], ...] = (
        ("Optimizer", lambda run: str(run.setting("optim.preset") or f.NA)),
        ("Parallel", parallel),
        ("Parameters", parameters),
        ("Peak device memory", lambda run: f.bytes_text(peak(run, "peak_allocated_bytes"))),
        ("Peak host memory", lambda run: f.bytes_text(peak(run, "host_rss_bytes"))),
    )
    for name, cell in more:
        cells = [cell(run) for run in runs]
        if any(value != f.NA for value in cells):
            rows.append((name, cells))
    return by_run([run.label for run in runs], rows, [colour_of(index) for index in range(len(runs))])


def subtitle(run: RunRecord) -> str:
    """What kind of run this is, in one line."""
    parts = [parameters(run), str(run.setting("optim.preset") or ""), parallel(run)]
    known = [
        part for part in (f"{parts[0]} parameters" if parts[0] != f.NA else "", *parts[1:]) if part not in ("", f.NA)
    ]
    return ", ".join(known)


def parameters(run: RunRecord) -> str:
    rows = run.ownership.get("parameters")
    elements = [row.get("elements") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    counts = [count for count in elements if isinstance(count, int)]
    return f.short(sum(counts)) if counts else f.NA


def parallel(run: RunRecord) -> str:
    strategy, world = run.setting("parallel.strategy"), run.environment.get("world") or run.setting("train.nproc")
    if not strategy:
        return f.NA
    engine = run.setting("engine")
    by = f" by {engine}" if engine not in (None, "native") else ""
    return f"{strategy} on {world} {'rank' if world == 1 else 'ranks'}{by}" if world else f"{strategy}{by}"


def peak(run: RunRecord, key: str) -> float | None:
    values = [value for row in run.log.rows if (value := finite(row.get(key))) is not None]
    return max(values, default=None)


def _cell(fact: Fact) -> str:
    return f"{fact.value} ({fact.note})" if fact.note else fact.value


def _step(run: RunRecord) -> Fact:
    # While a run goes on, its status still says where it began.
    known, logged = run.status.get("step"), max(row["step"] for row in run.rows)
    step = known if isinstance(known, int) and state(run) != "running" else logged
    total, left = run.setting("train.steps"), run.last("seconds_left")
    note = f"of {f.whole(total)}" if isinstance(total, int) else ""
    if state(run) == "running" and left:
        note += f"{', ' if note else ''}{f.seconds_text(left)} left"
    return Fact("Step", f.whole(step), note)


def _tokens(run: RunRecord) -> Fact:
    counts = [value for row in run.rows if (value := finite(row.get("tokens"))) is not None]
    total = run.setting("train.tokens")
    return Fact("Tokens", f.short(max(counts, default=None)), f"of {f.short(total)}" if isinstance(total, int) else "")


def _loss(run: RunRecord) -> Fact:
    return Fact("Last loss", f.fixed(run.last("loss")))


def _validation(run: RunRecord) -> Fact:
    losses = [(number(row["validation_loss"]), row) for row in run.validations.rows]
    finite = [(loss, row) for loss, row in losses if loss is not None and math.isfinite(loss)]
    if not finite:
        return Fact("Best validation", f.NA)
    loss, row = min(finite, key=lambda pair: pair[0])
    bits = number(row.get("validation_bits_per_byte"))
    note = f"step {row['step']:,}" + (f", {bits:.4f} bits per byte" if bits is not None else "")
    return Fact("Best validation", f.fixed(loss), note)


def _middle(run: RunRecord, key: str) -> float | None:
    """The median of a column: warm-up and stalls do not move it."""
    curve = run.curve(key)
    values = sorted(curve.finite().tolist()) if curve is not None else []
    return values[len(values) // 2] if values else None


def _speed(run: RunRecord) -> Fact:
    seconds = _middle(run, "step_seconds")
    note = f"{f.seconds_text(seconds)} a step" if seconds is not None else ""
    return Fact("Tokens per second", f.short(_middle(run, "tokens_per_second")), note)


def _mfu(run: RunRecord) -> Fact:
    return Fact("MFU", f.percent(_middle(run, "mfu")), f.flops_text(_middle(run, "model_flops_per_second")))


def _goodput(run: RunRecord) -> Fact:
    known = finite(run.status.get("goodput"))
    lost = lost_time(run)
    note = ""
    if lost and max(lost.values()) > 0:
        cause = max(lost, key=lambda name: lost[name])
        note = f"most lost: {cause.replace('_', ' ')}, {f.seconds_text(lost[cause])}"
    return Fact("Goodput", f.percent(known if known is not None else run.last("goodput")), note)


def _wall(run: RunRecord) -> Fact:
    productive = finite(run.status.get("productive_seconds"))
    note = f"{f.seconds_text(productive)} productive" if productive is not None else ""
    return Fact("Wall time", f.seconds_text(wall_seconds(run)), note)
