"""Many curves of one run at a glance: one line of a heat map each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from disttrain.report.chart import Chart, Trace, plain
from disttrain.report.curves import Curve, Floats, grid, packed
from disttrain.report.run_record import RunRecord

COLUMNS = 160
MOST_LINES = 120
_ROW_PIXELS = 15
DIVERGING = [[0, "#0072B2"], [0.5, "#E9E9E4"], [1, "#D55E00"]]
"""The page makes its middle as light or dark as the scheme."""
SEQUENTIAL = "Cividis"
COLOURBAR = {"thickness": 10, "len": 0.9, "outlinewidth": 0, "tickfont": {"size": 11}}


def heat_map(
    runs: Sequence[RunRecord],
    index: int,
    title: str,
    curves: Mapping[str, Curve],
    *,
    factor: float | None = None,
    unit: str = "",
    value: str = "",
) -> Chart | None:
    """One line per curve of run `index`. With `factor` the values are ratios, coloured from 1/factor over 1 to factor
    on a logarithmic scale."""
    if not curves:
        return None
    names = list(curves)[:MOST_LINES]
    axes, table = grid([curves[name] for name in names], COLUMNS)
    attributes: dict[str, Any] = {
        "type": "heatmap",
        "y": [plain(name) for name in names],
        "name": "",
        "colorbar": COLOURBAR,
    }
    attributes |= _ratios(table, factor) if factor is not None else {"z": _packed(table), "colorscale": SEQUENTIAL}
    shown = "%{customdata:.3~g}" if factor is not None else "%{z:.4~g}"
    attributes["hovertemplate"] = f"%{{y}}<br>%{{x}}<br>{shown} {value}<extra></extra>"
    layout = {
        "hovermode": "closest",
        "yaxis": {"autorange": "reversed", "tickfont": {"size": 10}, "type": "category", "tickformat": "", "nticks": 0}
        | {"showgrid": False},
    }
    of_run = f": {runs[index].label}" if len(runs) > 1 else ""
    chart = Chart(
        f"{title}{of_run}", [Trace(attributes, axes, index, whole=True)], unit, "wide", _height(len(names)), layout
    )
    if len(curves) > MOST_LINES:
        chart.notes.append(f"The first {MOST_LINES} of {len(curves):,}.")
    if max(len(curve) for curve in curves.values()) > COLUMNS:
        chart.notes.append(f"Each of the {len(axes)} columns shows the largest value of its log rows.")
    return chart


def _height(lines: int) -> int:
    return 90 + max(_ROW_PIXELS * lines, 90)


def _ratios(table: Floats, factor: float) -> dict[str, Any]:
    """Blue below one, orange above it."""
    with np.errstate(all="ignore"):
        logarithm = np.log10(np.where(table > 0, table, np.nan))
    end = float(np.log10(factor))
    ticks = [-end, -end / 2, 0.0, end / 2, end]
    shown = {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}x" for tick in ticks]}
    colours = {"zmin": -end, "zmid": 0, "zmax": end, "colorscale": DIVERGING, "colorbar": COLOURBAR | shown}
    return {"z": _packed(logarithm), "customdata": _packed(table)} | colours


def _packed(table: Floats) -> dict[str, str]:
    return packed(table.ravel(), "f4") | {"shape": f"{table.shape[0]}, {table.shape[1]}"}
