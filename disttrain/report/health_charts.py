"""Memory, goodput, checkpoints, and the time line of what happened."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from disttrain.report.chart import ALARM, NEUTRAL, Chart, Dict, Trace, colour_of, legend_entry, plain
from disttrain.report.formatting import Scale, scale, time_scale
from disttrain.report.line_charts import lines_chart
from disttrain.report.run_record import Event, RunRecord
from disttrain.report.speed_charts import bar, bars_chart
from disttrain.report.table import finite

MEMORY = {
    "peak_allocated_bytes": "allocated, peak",
    "peak_reserved_bytes": "reserved, peak",
    "host_rss_bytes": "host, largest rank",
}
PRODUCTIVE = "productive"
LOST = ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#8C6D31", "#0072B2", "#7F7F7F")

KINDS = {
    "start": ("triangle-right", "#009E73"),
    "resume": ("triangle-right-open", "#009E73"),
    "restart": ("triangle-right", "#0072B2"),
    "checkpoint": ("circle", NEUTRAL),
    "completed": ("star", "#009E73"),
    "stop": ("square", "#0072B2"),
    "warning": ("triangle-up", "#E69F00"),
    "slow_rank": ("triangle-down", "#E69F00"),
    "skipped": ("circle-open", "#CC79A7"),
    "rollback": ("triangle-left", "#CC79A7"),
    "lost_rank": ("x-open", ALARM),
    "failed": ("x", ALARM),
}
"""Symbol and colour of each kind of event; those that are not listed are grey diamonds."""
UNKNOWN_KIND = ("diamond", NEUTRAL)
MOST_MARKERS = 400
"""Of one kind and run."""


def memory_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    device = {key: name for key, name in MEMORY.items() if key != "host_rss_bytes"}
    found = [
        lines_chart(runs, "Device memory", device, "bytes", from_zero=True),
        lines_chart(runs, "Host memory", {"host_rss_bytes": MEMORY["host_rss_bytes"]}, "bytes", from_zero=True),
    ]
    return [chart for chart in found if chart is not None]


def goodput_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Goodput over the run, and where the wall time went."""
    share = lines_chart(runs, "Goodput", {"goodput": "goodput"}, "share", unit="% of wall time", from_zero=True)
    return [chart for chart in (share, lost_time_chart(runs)) if chart is not None]


def lost_time(run: RunRecord) -> dict[str, float]:
    """Seconds by cause, of status.json."""
    causes = run.status.get("lost_seconds")
    if not isinstance(causes, dict):
        return {}
    seconds = {str(cause): finite(value) for cause, value in causes.items()}
    return {cause: value for cause, value in seconds.items() if value is not None}


def lost_time_chart(runs: Sequence[RunRecord]) -> Chart | None:
    parts = []
    for run in runs:
        productive, lost = finite(run.status.get("productive_seconds")), lost_time(run)
        parts.append(({PRODUCTIVE: productive} if productive is not None else {}) | lost)
    names = list(dict.fromkeys(name for part in parts for name in part))
    if not any(name != PRODUCTIVE for name in names):
        return None
    scaled = scale("seconds", [sum(part.values()) for part in parts])
    labels = [plain(run.label) for run in runs]
    traces = []
    for position, name in enumerate(names):
        colour = "#009E73" if name == PRODUCTIVE else LOST[(position - 1) % len(LOST)]
        values = [part.get(name, 0.0) for part in parts]
        traces.append(bar(name.replace("_", " "), labels, values, scaled, colour))
    return bars_chart("Where the wall time went", traces, scaled.unit, len(runs))


def checkpoint_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """How long checkpoints took, and how long training stood still for them."""
    columns = {"checkpoint_write_seconds": "writing", "checkpoint_stall_seconds": "training stood still"}
    table = attrgetter("checkpoints")
    chart = lines_chart(runs, "Time for a checkpoint", columns, "seconds", from_zero=True, dots=True, table=table)
    return [chart] if chart is not None else []


def timeline_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """Steps done against the clock, with every event: a restart is a drop, a stand-still is flat."""
    if not any(run.events for run in runs):
        return None
    traces: list[Trace] = []
    unit = time_scale(longest_seconds(runs))
    for index, run in enumerate(runs):
        traces += _progress(run, index, unit)
    for kind in _kinds(runs):
        for index, run in enumerate(runs):
            if events := [event for event in run.events if event.kind == kind]:
                traces.append(_markers(kind, events[-MOST_MARKERS:], run, index, unit, len(runs) > 1))
        if len(runs) > 1:
            shape = {"symbol": KINDS.get(kind, UNKNOWN_KIND)[0], "size": 9, "color": NEUTRAL}
            traces.append(legend_entry(kind.replace("_", " "), mode="markers", marker=shape))
    layout = {
        "hovermode": "closest",
        "xaxis": {"title": {"text": f"{unit.unit} since the start"}, "exponentformat": "B"},
        "yaxis": {"tickformat": "", "exponentformat": "B", "rangemode": "tozero"},
    }
    return Chart("Time line", traces, "steps done", "wide", 320, layout, switches=False)


def longest_seconds(runs: Sequence[RunRecord]) -> float:
    """From the start of a run to its last row or event."""
    times = [event.seconds for run in runs for event in run.events]
    for run in runs:
        times += [max(run.times) - (run.start_seconds or 0.0)] if run.times else []
    return max(times, default=0.0)


def _kinds(runs: Sequence[RunRecord]) -> list[str]:
    present = {event.kind: None for run in runs for event in run.events}
    return [kind for kind in KINDS if kind in present] + [kind for kind in present if kind not in KINDS]


def _progress(run: RunRecord, index: int, unit: Scale) -> list[Trace]:
    """Log rows and events in the order of the clock."""
    points = [(event.seconds, event.step) for event in run.events]
    if (curve := run.curve("loss")) is not None and run.has_time:
        curve = curve.at(np.isfinite(curve.seconds))
        kept = curve.at(np.linspace(0, len(curve) - 1, min(len(curve), 500)).astype(int))
        points += zip(kept.seconds.tolist(), kept.step.astype(int).tolist(), strict=True)
    points.sort()
    colour = colour_of(index)
    attributes: Dict = {"type": "scatter", "mode": "lines", "name": plain(run.label), "hoverinfo": "skip"}
    attributes |= {"x": [_rounded(time / unit.factor) for time, _ in points], "y": [step for _, step in points]}
    attributes |= {"line": {"color": colour, "width": 1.4}, "opacity": 0.6, "showlegend": False}
    return [Trace(attributes, run=index)]


def _markers(kind: str, events: Sequence[Event], run: RunRecord, index: int, unit: Scale, several: bool) -> Trace:
    symbol, colour = KINDS.get(kind, UNKNOWN_KIND)
    size = 6 if kind == "checkpoint" else 11
    label = f"{run.label}: " if several else ""
    text = [plain(f"{label}{event.kind} at step {event.step:,}: {_brief(event.text)}") for event in events]
    attributes: Dict = {"type": "scatter", "mode": "markers", "name": plain(kind.replace("_", " ")), "text": text}
    attributes |= {"x": [_rounded(event.seconds / unit.factor) for event in events]}
    attributes |= {"y": [event.step for event in events], "hovertemplate": "%{text}<extra></extra>"}
    marker: Dict = {"symbol": symbol, "size": size, "color": colour_of(index) if several else colour}
    group = {"legendgroup": attributes["name"], "showlegend": not several, "cliponaxis": False}
    return Trace(attributes | {"marker": marker} | group, run=index)


def _brief(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")
