"""The page: sections of charts and tables in one self-contained HTML file that loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from disttrain import __version__
from disttrain.errors import UserError
from disttrain.report import details as d
from disttrain.report.chart import Chart, colour_of
from disttrain.report.curves import Floats, points_per_curve
from disttrain.report.formatting import Scale, time_scale
from disttrain.report.gradient_charts import gradient_charts
from disttrain.report.health_charts import (
    checkpoint_charts,
    goodput_charts,
    longest_seconds,
    memory_charts,
    timeline_chart,
)
from disttrain.report.html_tables import paragraph, text
from disttrain.report.learning_charts import learning_charts, loss_charts
from disttrain.report.run_record import RunRecord
from disttrain.report.speed_charts import speed_charts
from disttrain.report.stability_charts import attention_charts, loss_scale_charts, update_charts
from disttrain.report.summary import comparison, pill, subtitle, tiles

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""A browser that obeys it loads nothing, whatever stands in the page."""
_PER_ROW = {"wide": 1, "half": 2, "third": 3}


@dataclass(frozen=True)
class Section:
    """A heading with charts and, below them, HTML."""

    name: str
    charts: list[Chart]
    tables: str = ""


@dataclass(frozen=True)
class Page:
    html: str
    charts: int


def build_page(runs: Sequence[RunRecord], title: str | None = None) -> Page:
    """The whole file. Raises UserError when plotly is not installed."""
    script = plotly_script()
    sections = [section for section in _sections(runs) if section.charts or section.tables]
    charts = [chart for section in sections for chart in section.charts]
    points = points_per_curve([len(curve) for chart in charts for curve in chart.curves])
    unit = time_scale(longest_seconds(runs))
    for section in sections:
        fill_rows(section.charts)
    shown = title or (runs[0].label if len(runs) == 1 else f"{len(runs)} runs side by side")
    body = "\n".join([_header(runs, shown), _toolbar(runs, sections), *_section_html(sections, points), _footer()])
    data = {"charts": [chart.spec(points, unit.factor) for chart in charts], "axes": _axes(unit, charts)}
    return Page(_document(shown, body, data, script), len(charts))


def plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the report needs plotly, which is not installed: pip install 'disttrain[report]'") from None
    script = str(get_plotlyjs())
    return script.replace("</script", "<\\/script")


def _sections(runs: Sequence[RunRecord]) -> list[Section]:
    timeline = timeline_chart(runs)
    return [
        Section("Loss", loss_charts(runs)),
        Section("Learning", learning_charts(runs)),
        Section("Gradients", gradient_charts(runs)),
        Section("Stability", [*update_charts(runs), *attention_charts(runs), *loss_scale_charts(runs)]),
        Section("Speed", speed_charts(runs), d.per_run(runs, d.profile_table)),
        Section("Resources", [*memory_charts(runs), *goodput_charts(runs)]),
        Section("Events", [timeline] if timeline is not None else [], d.per_run(runs, d.events_table)),
        Section("Checkpoints", checkpoint_charts(runs), d.per_run(runs, d.checkpoints_table)),
        Section("Settings", [], d.config_tables(runs) + d.environment_table(runs) + d.per_run(runs, d.ownership_table)),
        Section("Samples", [], d.per_run(runs, d.samples_section)),
    ]


def fill_rows(charts: list[Chart]) -> None:
    """Widen what would leave a hole in its row."""
    for size, group in groupby(charts, key=lambda chart: chart.size):
        members = list(group)
        left = len(members) % _PER_ROW[size]
        for chart in members[len(members) - left :]:
            chart.size = "wide" if left == 1 else "half"


def _header(runs: Sequence[RunRecord], title: str) -> str:
    notes = [f"{run.label}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    without = [run.label for run in runs if not run.has_time]
    if without:
        who = "This run" if len(runs) == 1 else ", ".join(without)
        notes.append(f"{who} recorded no time of day: there is no curve against time.")
    below = "".join(paragraph(note) for note in notes)
    if len(runs) > 1:
        return f"<header><h1>{text(title)}</h1>{comparison(runs)}{below}</header>"
    line = f'<p class="subtitle">{text(subtitle(runs[0]))}</p>'
    return f"<header><h1>{text(title)} {pill(runs[0])}</h1>{line}{tiles(runs[0])}{below}</header>"


def _toolbar(runs: Sequence[RunRecord], sections: Sequence[Section]) -> str:
    """The switch of the horizontal axis, the runs, and links to the sections."""
    timeless = "" if any(run.has_time for run in runs) else " disabled"
    switch = "".join(
        f'<button type="button" data-axis="{axis}" aria-pressed="{str(axis == "step").lower()}"'
        f"{timeless if axis == 'time' else ''}>{name}</button>"
        for axis, name in (("step", "Steps"), ("tokens", "Tokens"), ("time", "Time"))
    )
    legend = "".join(
        f'<button type="button" class="run" data-run="{index}" aria-pressed="true">'
        f'<i class="dot" style="background:{colour_of(index)}"></i>{text(run.label)}</button>'
        for index, run in enumerate(runs)
    )
    links = "".join(f'<a href="#{section.name.lower()}">{section.name}</a>' for section in sections)
    shown = f'<div class="runs" role="group" aria-label="Runs shown">{legend}</div>' if len(runs) > 1 else ""
    axis = f'<div class="switch" role="group" aria-label="Horizontal axis">{switch}</div>'
    return f'<nav class="toolbar">{axis}{shown}<div class="links">{links}</div></nav>'


def _section_html(sections: Sequence[Section], points: int) -> list[str]:
    found, number = [], 0
    for section in sections:
        cards = []
        for chart in section.charts:
            cards.append(_card(chart, number, points))
            number += 1
        grid = '<div class="grid">\n' + "\n".join(cards) + "\n</div>\n" if cards else ""
        tables = f'<div class="tables">{section.tables}</div>' if section.tables else ""
        found.append(f'<section id="{section.name.lower()}"><h2>{section.name}</h2>\n{grid}{tables}</section>')
    return found


def _card(chart: Chart, number: int, points: int) -> str:
    unit = f' <span class="soft">{text(chart.unit)}</span>' if chart.unit else ""
    notes = [*chart.notes, chart.gap_note(), chart.thinned_note(points)]
    below = paragraph(" ".join(note for note in notes if note)) if any(notes) else ""
    plot = f'<div class="plot" id="chart-{number}" style="height:{chart.height}px"></div>'
    return f'<figure class="card {chart.size}"><figcaption>{text(chart.title)}{unit}</figcaption>{plot}{below}</figure>'


def _axes(unit: Scale, charts: Sequence[Chart]) -> dict[str, dict[str, Any]]:
    """Title and end of the three axes: all charts begin and end at the same place."""
    curves = [trace.curve for chart in charts for trace in chart.traces if trace.curve is not None]
    ends = {
        "step": max((last_of(curve.step) for curve in curves), default=0.0),
        "tokens": max((last_of(curve.tokens) for curve in curves), default=0.0),
        "time": max((last_of(curve.seconds) for curve in curves), default=0.0) / unit.factor,
    }
    titles = {"step": "step", "tokens": "tokens", "time": f"{unit.unit} since the start"}
    return {axis: {"title": title, "end": ends[axis] or 1.0} for axis, title in titles.items()}


def last_of(values: Floats) -> float:
    return float(values[np.isfinite(values)].max(initial=0.0))


def _footer() -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    help_line = "Drag over a chart to zoom, double-click to go back; click a legend to hide what it names."
    return f"<footer>{help_line} Written by disttrain {text(__version__)} on {now}.</footer>"


def _document(title: str, body: str, data: dict[str, Any], plotly: str) -> str:
    here = files("disttrain.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # No text of a run can end the script element that it is stored in.
    stored = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
<noscript>The charts need JavaScript; the numbers and tables do not.</noscript>
</main>
<script type="application/json" id="report-data">{stored}</script>
<script>{plotly}</script>
<script>
{script}</script>
</body>
</html>
"""


def write_page(page: Page, output: Path) -> int:
    """Write beside it, then rename; its size in bytes. Raises UserError when that is not possible."""
    whole = output.with_name(f"{output.name}.tmp")
    content = page.html.encode("utf-8", errors="replace")
    try:
        whole.write_bytes(content)
        whole.replace(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}; set --output to another file") from None
    return len(content)
