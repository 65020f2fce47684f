"""Charts of one or more columns over the run. One run: a colour per column. Several: a colour per run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from disttrain.report.chart import DASHES, Chart, Trace, colour_of, legend_entry, line, log_if_wide, plain
from disttrain.report.curves import Curve, Floats
from disttrain.report.formatting import Kind, scale
from disttrain.report.run_record import RunRecord
from disttrain.report.table import Table

LOG: Callable[[RunRecord], Table] = attrgetter("log")
FEW_COUNTS = 5


def lines_chart(
    runs: Sequence[RunRecord],
    title: str,
    columns: Mapping[str, str],
    kind: Kind = "plain",
    *,
    unit: str = "",
    logarithmic: bool = False,
    from_zero: bool = False,
    merge: bool = False,
    dots: bool = False,
    table: Callable[[RunRecord], Table] = LOG,
    **more: Any,
) -> Chart | None:
    """`columns` (key -> name) of every run in one chart; None when no run has any of them.

    `merge` draws columns that are equal throughout as one; `dots` marks each row; `table` picks other rows than those
    of the log. `more` goes to Chart.
    """
    found = [{key: curve for key in columns if (curve := table(run).curve(key)) is not None} for run in runs]
    if not any(found):
        return None
    names = _merged(found, columns) if merge else dict(columns)
    names = {key: name for key, name in names.items() if any(key in curves for curves in found)}
    values = np.concatenate([curve.finite() for curves in found for curve in curves.values()])
    scaled = scale(kind, np.abs(values).tolist())
    style: dict[str, Any] = {"hovertemplate": "%{y:,.0f}" if kind == "count" else "%{y:.4~g}"}
    style |= {"mode": "lines+markers", "marker": {"size": 5}} if dots else {}
    traces = [
        _trace(curves[key].with_values(curves[key].values / scaled.factor), key, names, index, runs, style)
        for index, curves in enumerate(found)
        for key in names
        if key in curves
    ]
    if len(runs) > 1 and len(names) > 1:
        traces += [legend_entry(name, DASHES[place % len(DASHES)]) for place, name in enumerate(names.values())]
    axis = _axis(values / scaled.factor, kind, logarithmic, from_zero)
    return Chart(title, traces, unit or scaled.unit, layout={"yaxis": axis}, **more)


def _merged(found: Sequence[Mapping[str, Curve]], columns: Mapping[str, str]) -> dict[str, str]:
    """Columns that are equal to an earlier one in every run give it their names."""
    names: dict[str, str] = {}
    for key, name in columns.items():
        same = next((other for other in names if all(_equal(curves, key, other) for curves in found)), None)
        if same is None:
            names[key] = name
        else:
            names[same] += f", {name}"
    return names


def _equal(curves: Mapping[str, Curve], one: str, other: str) -> bool:
    if one not in curves or other not in curves:
        return one not in curves and other not in curves
    return np.array_equal(curves[one].values, curves[other].values, equal_nan=True)


def _axis(values: Floats, kind: Kind, logarithmic: bool, from_zero: bool) -> dict[str, Any]:
    axis = log_if_wide(values) if logarithmic else {}
    if kind == "count":
        axis |= {"tickformat": "~s"} if axis else {"tickformat": "", "exponentformat": "B"}
        axis |= {"dtick": 1} if 0 < values.max(initial=0) <= FEW_COUNTS else {}
    return axis if "type" in axis or not from_zero else axis | {"rangemode": "tozero"}


def _trace(
    curve: Curve, key: str, names: Mapping[str, str], index: int, runs: Sequence[RunRecord], style: dict[str, Any]
) -> Trace:
    name, place = names[key], list(names).index(key)
    if len(runs) == 1:
        return line(curve, name, index, colour_of(place), **style)
    label = runs[index].label if len(names) == 1 else f"{runs[index].label}: {name}"
    of_group = {"line": {"dash": DASHES[place % len(DASHES)]}, "legendgroup": plain(name), "showlegend": False}
    return line(curve, label, index, colour_of(index), **of_group, **style)
