"""A chart as data: plotly's own trace and layout dictionaries, whose curves are thinned and packed when it is written.

Names of runs, groups and units come from files: `plain` keeps plotly from reading markup into them.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from disttrain.report.curves import Curve, packed
from disttrain.report.run_record import RunRecord

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
"""Okabe and Ito's colours, readable on white and on black and told apart by the colour-blind."""
NEUTRAL, ALARM = "#8A929C", "#D55E00"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
Size = Literal["wide", "half", "third"]
Dict = dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """One trace; where it has a curve, the curve's axes follow the page's switch and its values are `attributes["y"]`.

    `run` is the run that a click in the page's legend hides; -1 for none. `whole`: never thinned, for curves with a
    text per point.
    """

    attributes: Dict
    curve: Curve | None = None
    run: int = -1
    whole: bool = False


@dataclass
class Chart:
    """A card of the page. `unit` stands beside the title, `notes` (plain text) below the chart.

    `switches`: its horizontal axis follows the page's switch; `whole_range`: it shows all of that axis.
    """

    title: str
    traces: list[Trace]
    unit: str = ""
    size: Size = "half"
    height: int = 270
    layout: Dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    switches: bool = True
    whole_range: bool = True

    @property
    def curves(self) -> list[Curve]:
        """Those that may be thinned."""
        return [trace.curve for trace in self.traces if trace.curve is not None and not trace.whole]

    def spec(self, points: int, seconds_per_unit: float) -> Dict:
        """What the page draws: `data` and `layout` of plotly, and per trace its three axes (or null) and its run."""
        data: list[Dict] = []
        axes: list[Dict | None] = []
        for trace in self.traces:
            if trace.curve is None:
                data.append(trace.attributes)
                axes.append(None)
                continue
            thin = trace.curve if trace.whole else trace.curve.thinned(points)
            values = trace.attributes if "z" in trace.attributes else {"y": packed(thin.values, "f4")}
            data.append(trace.attributes | values)
            axes.append(thin.encoded(seconds_per_unit))
        runs = [trace.run for trace in self.traces]
        drawn = {"data": data, "axes": axes, "runs": runs, "layout": self.full_layout()}
        return drawn | {"switches": self.switches, "whole_range": self.whole_range}

    def full_layout(self) -> Dict:
        named = [trace for trace in self.traces if trace.attributes.get("showlegend", True)]
        layout: Dict = {
            "height": self.height,
            "margin": {"l": 8, "r": 14, "t": 12, "b": 8},
            "hovermode": "x unified",
            "showlegend": len(named) > 1,
            "legend": {
                "font": {"size": 12},
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "traceorder": "normal",
            },
            "xaxis": {"automargin": True, "showgrid": False, "zeroline": False, "exponentformat": "B", "nticks": 7}
            | {"showspikes": True, "spikemode": "across", "spikethickness": -1, "spikedash": "solid"},
            "yaxis": {"automargin": True, "zeroline": False, "tickformat": "~g", "nticks": 6, "showspikes": False},
            "font": {"size": 12},
        }
        for key, value in self.layout.items():
            layout[key] = layout.get(key, {}) | value if isinstance(value, dict) else value
        return layout

    def thinned_note(self, points: int) -> str | None:
        """Said on the page when a curve has more points than are drawn."""
        longest = max((len(curve) for curve in self.curves), default=0)
        if longest <= points:
            return None
        return f"Thinned from {longest:,} to {points:,} points; the lowest and highest of neighbours are kept."

    def gap_note(self) -> str | None:
        """Said on the page when values are not finite."""
        gaps = sum(len(curve) - len(curve.finite()) for curve in self.curves)
        return f"{gaps:,} {'value is' if gaps == 1 else 'values are'} not finite and drawn as gaps." if gaps else None


def plain(text: object) -> str:
    """Text that plotly shows as it is."""
    return html.escape(str(text), quote=False)


def line(curve: Curve, name: object, run: int, colour: str, **more: Any) -> Trace:
    """A thin line; `more` is plotly's (`line` is merged)."""
    style = {"color": colour, "width": 1.6} | more.pop("line", {})
    attributes = {"type": "scatter", "mode": "lines", "name": plain(name), "line": style}
    return Trace(attributes | {"hovertemplate": "%{y:.4~g}"} | more, curve, run)


def markers(curve: Curve, name: object, run: int, colour: str, symbol: str = "circle", **more: Any) -> Trace:
    style = {"color": colour, "size": 6, "symbol": symbol} | more.pop("marker", {})
    attributes = {"type": "scatter", "mode": "markers", "name": plain(name), "marker": style}
    return Trace(attributes | {"hovertemplate": "%{y:.4~g}"} | more, curve, run)


def legend_entry(name: str, dash: str = "solid", **more: Any) -> Trace:
    """An entry in grey for what several runs draw in their own colours; a click on it hides all of its group."""
    attributes: Dict = {"type": "scatter", "mode": "lines", "x": [None], "y": [None], "hoverinfo": "skip"}
    attributes |= {"name": plain(name), "legendgroup": plain(name), "line": {"color": NEUTRAL, "dash": dash}}
    return Trace(attributes | more)


EVENT_LINES = ("resume", "restart", "failed", "rollback", "lost_rank")
MOST_EVENT_LINES = 100


def event_lines(runs: Sequence[RunRecord]) -> tuple[list[Trace], Dict]:
    """Vertical lines where a run was torn, and the hidden axis that they need."""
    traces = []
    for index, run in enumerate(runs):
        events = [event for event in run.events if event.kind in EVENT_LINES][-MOST_EVENT_LINES:]
        if not events:
            continue
        steps = np.repeat([float(event.step) for event in events], 3)
        seconds = np.repeat([event.seconds if run.has_time else np.nan for event in events], 3)
        height = np.tile([0.0, 1.0, np.nan], len(events))
        text = [plain(f"{event.kind}: {event.text}") for event in events for _ in range(3)]
        colour = colour_of(index) if len(runs) > 1 else NEUTRAL
        style = {"color": colour, "width": 1.2, "dash": "dot"}
        attributes: Dict = {"type": "scatter", "mode": "lines", "name": "event", "yaxis": "y2", "line": style}
        attributes |= {"text": text, "hovertemplate": "%{text}", "showlegend": False}
        curve = Curve(steps, run.tokens_at(steps), seconds, height)
        traces.append(Trace(attributes, curve, index, whole=True))
    hidden: Dict = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    return traces, {"yaxis2": hidden} if traces else {}


def colour_of(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def log_if_wide(values: Sequence[float] | Any, ratio: float = 30.0) -> Dict:
    """A logarithmic axis for positive values that span more than `ratio`."""
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    if not len(array) or array.min() <= 0 or array.max() / array.min() <= ratio:
        return {}
    if array.max() / array.min() > 300:
        return {"type": "log", "dtick": 1, "tickformat": "", "exponentformat": "power"}
    return {"type": "log", "dtick": "D2", "tickformat": "~e" if array.min() < 1e-4 else "~g"}
