"""How fast it went, and where the time of a step went."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from disttrain.report.chart import NEUTRAL, Chart, Dict, Trace, colour_of, plain
from disttrain.report.curves import Curve, Floats
from disttrain.report.formatting import Scale, scale, seconds_text, significant
from disttrain.report.histogram import StepTimes, step_times
from disttrain.report.line_charts import lines_chart
from disttrain.report.rank_charts import rank_charts
from disttrain.report.run_record import RunRecord

WITHIN = {
    "forward_seconds": "forward",
    "backward_seconds": "backward",
    "optimizer_seconds": "optimizer",
    "communication_seconds": "waiting for communication",
    "data_seconds": "data",
}
"""Parts of `step_seconds`, which leaves out what stands between steps."""
OTHER = "other"
BETWEEN = {
    "checkpoint_seconds": "checkpoint",
    "evaluation_seconds": "evaluation",
    "comparison_seconds": "comparison of copies",
}
BETWEEN_NOTE = "Checkpoint and evaluation stand between steps; their time is shared out over the steps of a log row."
WIDE_RATIO = 6.0
"""Step times that span more than this have a logarithmic axis: the first step of a run is much longer than the rest."""


def speed_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Throughput, utilisation, the parts of a step, and the spread of step times over steps and ranks."""
    flops = {"model_flops_per_second": "model FLOP/s"}
    found = [
        lines_chart(runs, "Throughput", {"tokens_per_second": "tokens/s"}, "count", unit="tokens/s", from_zero=True),
        lines_chart(runs, "Model FLOPs utilisation (MFU)", {"mfu": "MFU"}, "share", from_zero=True)
        or lines_chart(runs, "Model FLOP/s", flops, "flops", from_zero=True),
        *([breakdown_over_run(runs[0])] if len(runs) == 1 else [breakdown_of_runs(runs)]),
        histogram_chart(runs),
        *rank_charts(runs),
    ]
    return [chart for chart in found if chart is not None]


def step_parts(run: RunRecord) -> tuple[Curve, dict[str, Floats]] | None:
    """The time per step, and what each part took of it at the same rows; `other` is the rest of the step itself.

    None where a run logged no more than one part of a step.
    """
    steps, present = run.curve("step_seconds"), [key for key in WITHIN if key in run.keys]
    if steps is None or len(present) < 2:
        return None
    rows = run.log.column("step_seconds").present
    within = {WITHIN[key]: _known(run.log.column(key).values[rows]) for key in present}
    between = {name: _known(run.log.column(key).values[rows]) for key, name in BETWEEN.items() if key in run.keys}
    rest = np.clip(_known(steps.values) - sum(within.values()), 0.0, None)
    parts = within | {OTHER: rest} | between
    return steps.with_values(np.sum(list(parts.values()), axis=0)), parts


def breakdown_over_run(run: RunRecord) -> Chart | None:
    """The parts as a stack over the run."""
    found = step_parts(run)
    if found is None:
        return None
    total, parts = found
    scaled = scale("seconds", [_typical_largest(total.values)])
    traces = []
    for name, values in parts.items():
        colour = _part_colour(name)
        curve = Curve(total.step, total.tokens, total.seconds, values / scaled.factor, guide=total.values)
        attributes: Dict = {"type": "scatter", "mode": "lines", "name": name, "stackgroup": "step", "fillcolor": colour}
        attributes |= {"line": {"width": 0, "color": colour}, "hovertemplate": "%{y:.3~g}"}
        traces.append(Trace(attributes, curve, 0))
    notes = [BETWEEN_NOTE] if any(name in parts for name in BETWEEN.values()) else []
    return Chart("Time of a step", traces, scaled.unit, "wide", 320, notes=notes)


def breakdown_of_runs(runs: Sequence[RunRecord]) -> Chart | None:
    """The parts of the average step of each run, as one bar per run."""
    means: list[dict[str, float]] = []
    for run in runs:
        found = step_parts(run)
        means.append({name: float(values.mean()) for name, values in found[1].items()} if found else {})
    known = (*WITHIN.values(), OTHER, *BETWEEN.values())
    names = [name for name in known if any(name in mean for mean in means)]
    if not names:
        return None
    scaled = scale("seconds", [sum(mean.values()) for mean in means])
    labels = [plain(run.label) for run in runs]
    traces = [bar(name, labels, [mean.get(name, 0.0) for mean in means], scaled, _part_colour(name)) for name in names]
    return bars_chart("Time of an average step", traces, scaled.unit, len(runs))


def bar(name: str, labels: Sequence[str], values: Sequence[float], scaled: Scale, colour: str) -> Trace:
    """One part of horizontal bars that stand one under another."""
    attributes: Dict = {"type": "bar", "orientation": "h", "name": plain(name), "marker": {"color": colour}}
    shown = [plain(f"{name}: {seconds_text(value)}") for value in values]
    attributes |= {"x": [value / scaled.factor for value in values], "y": list(labels), "text": shown}
    return Trace(attributes | {"textposition": "none", "hovertemplate": "%{text}<extra></extra>"})


def bars_chart(title: str, traces: list[Trace], unit: str, bars: int) -> Chart:
    layout = {
        "barmode": "stack",
        "bargap": 0.35,
        "hovermode": "closest",
        "xaxis": {"showgrid": True, "tickformat": "~g"},
        "yaxis": {"autorange": "reversed", "type": "category", "tickformat": "", "showgrid": False}
        | ({"showticklabels": False} if bars == 1 else {}),
    }
    return Chart(title, traces, unit, "wide", 120 + 40 * bars, layout, switches=False)


def histogram_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """The share of steps by their time, over all ranks."""
    found = [(index, run, times) for index, run in enumerate(runs) if (times := step_times(run)) is not None]
    if not found:
        return None
    scaled = scale("seconds", [times.quantile(0.5) for _, _, times in found])
    traces, notes = [], []
    for index, run, times in found:
        traces.append(_histogram(run, index, times, scaled, len(runs)))
        middle, high, top = (seconds_text(times.quantile(share)) for share in (0.5, 0.99, 1.0))
        label = f"{run.label}: " if len(runs) > 1 else ""
        notes.append(f"{label}Half of the steps below {middle}, 99% below {high}, all below {top}.")
    layout: Dict = {
        "barmode": "overlay",
        "bargap": 0.05,
        "hovermode": "closest",
        "xaxis": {"tickformat": "~g", "title": {"text": f"time of a step, {scaled.unit}"}},
    }
    longest, shortest = (pick(edge for _, _, times in found for edge in times.edges) for pick in (max, min))
    if shortest > 0 and longest / shortest > WIDE_RATIO:
        layout["xaxis"] |= {"type": "log", "dtick": "D2"}
    return Chart("Step times of all ranks", traces, "% of steps", "half", 270, layout, notes, switches=False)


def _histogram(run: RunRecord, index: int, times: StepTimes, scaled: Scale, runs: int) -> Trace:
    edges, shares = times.edges / scaled.factor, 100 * times.counts / times.counts.sum()
    text = [
        plain(f"{significant(low, 3)} to {significant(high, 3)} {scaled.unit}: {count:,.0f} steps")
        for low, high, count in zip(edges[:-1], edges[1:], times.counts, strict=True)
    ]
    if runs > 1:
        outline: Dict = {
            "type": "scatter",
            "mode": "lines",
            "line": {"color": colour_of(index), "shape": "hv", "width": 2},
        }
        outline |= {"x": edges.tolist(), "y": [*shares.tolist(), 0.0], "text": [*text, ""], "showlegend": False}
        shown = "%{text}<extra>%{fullData.name}</extra>"
        return Trace(outline | {"name": plain(run.label), "hovertemplate": shown}, run=index)
    attributes: Dict = {"type": "bar", "name": plain(run.label), "x": ((edges[:-1] + edges[1:]) / 2).tolist()}
    attributes |= {
        "width": (0.96 * np.diff(edges)).tolist(),
        "y": shares.tolist(),
        "text": text,
        "textposition": "none",
    }
    attributes |= {"marker": {"color": colour_of(index), "line": {"width": 0}}}
    return Trace(attributes | {"hovertemplate": "%{text}<extra></extra>", "showlegend": False}, run=index)


def _known(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, 0.0)


def _part_colour(name: str) -> str:
    """The same for a part in every report."""
    return NEUTRAL if name == OTHER else colour_of([*WITHIN.values(), *BETWEEN.values()].index(name))


def _typical_largest(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, 0.9)) if len(finite) else 0.0
