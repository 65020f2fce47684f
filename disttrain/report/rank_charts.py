"""What was logged per rank (`monitor.rank_metrics`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from disttrain.report.chart import Chart
from disttrain.report.formatting import Kind, scale
from disttrain.report.heat_maps import heat_map
from disttrain.report.line_charts import lines_chart
from disttrain.report.run_record import RunRecord

FEW_RANKS = 4
KINDS: dict[str, Kind] = {"seconds": "seconds", "bytes": "bytes", "share": "share"}
"""By the last word of a column."""
TITLES = {
    "own_step_seconds": "Step time without waiting, by rank",
    "host_rss_bytes": "Host memory by rank",
    "cpu_share": "Load of the CPU by rank",
    "peak_allocated_bytes": "Device memory by rank: allocated, peak",
    "peak_reserved_bytes": "Device memory by rank: reserved, peak",
}


def rank_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Lines for a few ranks of one run, otherwise a heat map per run."""
    charts: list[Chart | None] = []
    for index, run in enumerate(runs):
        columns: dict[str, dict[str, str]] = {}
        for name in run.names("rank"):
            rank, _, metric = name.partition("/")
            columns.setdefault(metric, {})[f"rank/{name}"] = f"rank {rank}"
        for metric, named in columns.items():
            title = TITLES.get(metric, f"{metric} by rank")
            kind = KINDS.get(metric.rpartition("_")[2], "plain")
            if len(runs) == 1 and len(named) <= FEW_RANKS:
                charts.append(lines_chart(runs, title, named, kind))
            elif kind == "seconds":
                charts.append(_against_the_median(runs, index, title, named))
            else:
                charts.append(_values(runs, index, title, named, kind))
    return [chart for chart in charts if chart is not None]


def _values(runs: Sequence[RunRecord], index: int, title: str, named: dict[str, str], kind: Kind) -> Chart | None:
    curves = {name: curve for key, name in named.items() if (curve := runs[index].curve(key)) is not None}
    scaled = scale(kind, [float(curve.finite().max(initial=0.0)) for curve in curves.values()])
    drawn = {name: curve.with_values(curve.values / scaled.factor) for name, curve in curves.items()}
    return heat_map(runs, index, title, drawn, unit=scaled.unit, value=scaled.unit)


def _against_the_median(runs: Sequence[RunRecord], index: int, title: str, named: dict[str, str]) -> Chart | None:
    """Each rank over the median rank of the same row, so that a slow one stands out of slow steps of all."""
    curves = {name: curve for key, name in named.items() if (curve := runs[index].curve(key)) is not None}
    if len({len(curve) for curve in curves.values()}) != 1:
        return _values(runs, index, title, named, "seconds")
    middle = np.median([curve.values for curve in curves.values()], axis=0)
    with np.errstate(all="ignore"):
        against = {name: curve.with_values(curve.values / middle) for name, curve in curves.items()}
    chart = heat_map(runs, index, title, against, factor=1.5, value="times the median")
    if chart is not None:
        chart.notes.append("Against the median of the ranks in the same row: above 1 (orange) a rank takes longer.")
    return chart
