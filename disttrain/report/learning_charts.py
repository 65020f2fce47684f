"""What was learned, and at which rate and batch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from disttrain.report.chart import Chart, Trace, colour_of, event_lines, legend_entry, line
from disttrain.report.curves import Curve, smoothed
from disttrain.report.line_charts import lines_chart
from disttrain.report.run_record import RunRecord

BITS = {"validation_bits_per_byte": "bits per byte"}
ROWS_TO_SMOOTH = 60
"""A curve of fewer rows is drawn as it is."""


def loss_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Training and validation loss, with a line wherever the run was torn; its second half, where the first one hides
    how runs differ; and validation in bits per byte."""
    traces, window = _loss_traces(runs)
    lines, axis = event_lines(runs)
    layout = {"legend": {"font": {"size": 13}}} | axis
    chart = Chart("Training and validation loss", traces + lines, "nats per token", "wide", 400, layout)
    if window:
        chart.notes.append(
            f"Strong line: smoothed over up to {window} log rows, without single spikes; faint: every row."
        )
    if lines:
        chart.notes.append("Dotted verticals: resumes, restarts, failures, rollbacks and lost ranks; hover to read.")
    found = [chart]
    if window:
        half = max(row["step"] for run in runs for row in run.rows) / 2
        later, _ = _loss_traces(runs, half)
        found.append(Chart("Loss, second half", later, "nats per token", whole_range=False))
    table = attrgetter("validations")
    bits = lines_chart(runs, "Validation", BITS, unit="bits per byte", dots=True, table=table)
    return found + ([bits] if bits is not None else [])


def _loss_traces(runs: Sequence[RunRecord], begin: float = 0.0) -> tuple[list[Trace], int]:
    """Those from step `begin` on, and how many rows a smoothed line averages (0: there is none)."""
    several, window = len(runs) > 1, 0
    traces: list[Trace] = []
    for index, run in enumerate(runs):
        label = f"{run.label}: " if several else ""
        shown: dict[str, Any] = {"showlegend": not several, "hovertemplate": "%{y:.4f}"}
        if (curve := run.curve("loss")) is not None:
            traces += _training(curve, begin, label, index, shown)
            window = max(window, _window(curve))
        if (curve := run.validations.curve("validation_loss")) is not None:
            colour = colour_of(index) if several else colour_of(1)
            style = {"mode": "lines+markers", "marker": {"size": 7, "color": colour, "symbol": "diamond"}} | shown
            style |= {"legendgroup": "validation", "line": {"width": 1.2, "dash": "dot"}}
            traces.append(line(curve.at(curve.step >= begin), f"{label}validation", index, colour, **style))
    if several:
        groups = dict.fromkeys(str(trace.attributes["legendgroup"]) for trace in traces)
        traces += [legend_entry(group, "dot" if group == "validation" else "solid") for group in groups]
    return traces, window


def _window(curve: Curve) -> int:
    """How many rows the smoothed line averages; 0: none."""
    return len(curve) // 50 * 2 + 5 if len(curve) >= ROWS_TO_SMOOTH else 0


def _training(curve: Curve, begin: float, label: str, index: int, shown: dict[str, Any]) -> list[Trace]:
    colour, window, later = colour_of(index), _window(curve), curve.step >= begin
    if not window:
        return [line(curve.at(later), f"{label}training", index, colour, legendgroup="training", **shown)]
    smooth = curve.with_values(smoothed(curve.values, window)).at(later)
    faint = {"opacity": 0.35, "line": {"width": 1}}
    return [
        line(curve.at(later), f"{label}training", index, colour, legendgroup="training", **faint, **shown),
        line(smooth, f"{label}smoothed", index, colour, legendgroup="smoothed", line={"width": 2.2}, **shown),
    ]


def learning_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Learning rates, batch and noise scale."""
    rates = {f"lr/{group}": group for run in runs for group in run.names("lr")} or {"lr": "learning rate"}
    found = [
        lines_chart(runs, "Learning rate", rates, merge=True, from_zero=True),
        _batch_chart(runs),
    ]
    return [chart for chart in found if chart is not None]


def _batch_chart(runs: Sequence[RunRecord]) -> Chart | None:
    columns = {"global_batch_tokens": "batch", "noise_scale_tokens": "noise scale"}
    if len(runs) == 1:
        columns["suggested_batch_tokens"] = "suggested batch"
    measured = any("noise_scale_tokens" in run.keys for run in runs)
    title = "Batch and noise scale" if measured else "Batch"
    chart = lines_chart(runs, title, columns, "count", unit="tokens", logarithmic=measured, from_zero=not measured)
    if chart is not None and measured:
        chart.notes.append("A batch far above the noise scale buys little; one far below it leaves steps noisy.")
    return chart
