"""Norms with their thresholds, and what was clipped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from disttrain.report.chart import (
    ALARM,
    NEUTRAL,
    Chart,
    Size,
    Trace,
    colour_of,
    legend_entry,
    line,
    log_if_wide,
    markers,
)
from disttrain.report.curves import Curve
from disttrain.report.heat_maps import heat_map
from disttrain.report.line_charts import lines_chart
from disttrain.report.run_record import RunRecord, names_of_all
from disttrain.report.table import Mask

MOST_GROUPS = 12
MANY_CIRCLES = 150
FEW_UNITS = 4
"""Up to so many clip units have a chart each; more of them share a heat map."""


def gradient_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The norm of everything, of each group, the share of clipped steps, and of each unit."""
    groups = names_of_all(runs, "grad_norm")
    shares = [f"clip_share/{group}" for group in groups]
    found = [norm_chart(runs, "Gradient norm", "grad_norm", "clip_threshold", shares)]
    sized: Size = "third" if len(groups) > 2 else "half"
    for group in groups[:MOST_GROUPS]:
        keys = (f"grad_norm/{group}", f"clip_threshold/{group}", [f"clip_share/{group}"])
        chart = norm_chart(runs, f"Gradient norm: {group}", *keys)
        if chart is not None:
            chart.size, chart.height = sized, 240 if sized == "third" else 270
            found.append(chart)
    found.append(
        lines_chart(runs, "Share clipped", {f"clip_share/{g}": g for g in groups}, "share", merge=True, from_zero=True)
    )
    return [chart for chart in found if chart is not None] + unit_charts(runs)


def norm_chart(runs: Sequence[RunRecord], title: str, key: str, threshold: str, shares: Sequence[str]) -> Chart | None:
    """A norm before clipping, its threshold as a broken line, and circles where something was clipped."""
    traces: list[Trace] = []
    several = len(runs) > 1
    for index, run in enumerate(runs):
        curve = run.curve(key)
        if curve is None:
            continue
        label, colour = f"{run.label}: " if several else "", colour_of(index)
        shown = {"showlegend": not several}
        traces.append(line(curve, f"{label}norm", index, colour, legendgroup="norm", **shown))
        if (limit := run.curve(threshold)) is not None:
            style = {"line": {"dash": "dash", "width": 1.2}, "legendgroup": "threshold"} | shown
            limit_colour = colour if several else NEUTRAL
            traces.append(line(limit, f"{label}threshold", index, limit_colour, **style))
        if len(clipped := curve.at(clipped_rows(run, key, shares))):
            ring = colour if several else ALARM
            faint = {"opacity": 0.45} if len(clipped) > MANY_CIRCLES else {}
            style = {
                "marker": {"size": 5, "line": {"width": 1}} | faint,
                "legendgroup": "clipped",
                "hoverinfo": "skip",
            } | shown
            traces.append(markers(clipped, f"{label}clipped", index, ring, "circle-open", **style))
            traces[-1].attributes.pop("hovertemplate")
    if not traces:
        return None
    if several:
        groups = dict.fromkeys(str(trace.attributes["legendgroup"]) for trace in traces)
        traces += [_entry(group) for group in groups] if len(groups) > 1 else []
    values = np.concatenate([trace.curve.finite() for trace in traces if trace.curve is not None])
    return Chart(title, traces, layout={"yaxis": log_if_wide(values)})


def _entry(group: str) -> Trace:
    if group != "clipped":
        return legend_entry(group, "dash" if group == "threshold" else "solid")
    return legend_entry(group, mode="markers", marker={"color": NEUTRAL, "size": 6, "symbol": "circle-open"})


def clipped_rows(run: RunRecord, key: str, shares: Sequence[str]) -> Mask:
    """A mask over the rows that have `key`: was anything clipped since the row before?"""
    clipped = np.zeros(len(run.log), dtype=bool)
    for share in shares:
        clipped |= run.log.column(share).values > 0
    return clipped[run.log.column(key).present]


def unit_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Clip units: a chart each for a few; for many a heat map per run of norm over threshold."""
    units = names_of_all(runs, "unit_norm")
    if len(units) <= FEW_UNITS:
        keys = [(f"unit_norm/{unit}", f"unit_threshold/{unit}", [f"unit_clip_share/{unit}"]) for unit in units]
        few = [norm_chart(runs, f"Unit norm: {unit}", *key) for unit, key in zip(units, keys, strict=True)]
        return [chart for chart in few if chart is not None]
    charts = []
    for index, run in enumerate(runs):
        ratios = {unit: ratio for unit in run.names("unit_norm") if (ratio := _ratio(run, unit)) is not None}
        title = "Clip units: norm over threshold"
        chart = heat_map(runs, index, title, ratios, factor=10.0, value="times the threshold")
        if chart is not None:
            chart.notes.append("Above 1 (orange) a unit is clipped. Blank: no threshold yet (warm-up of its history).")
            charts.append(chart)
    return charts


def _ratio(run: RunRecord, unit: str) -> Curve | None:
    """Norm over threshold, of the rows that have both."""
    norm, limit = run.log.column(f"unit_norm/{unit}"), run.log.column(f"unit_threshold/{unit}")
    both = norm.present & limit.present & (limit.values > 0) & np.isfinite(limit.values)
    if not both.any():
        return None
    ratio = np.full(len(run.log), np.nan)
    ratio[both] = norm.values[both] / limit.values[both]
    return run.log.curve_of(ratio, both)
