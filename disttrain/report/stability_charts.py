"""How far updates went, how large attention logits grew, and what the loss scale did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from disttrain.report.chart import NEUTRAL, Chart, colour_of, line
from disttrain.report.gradient_charts import MOST_GROUPS
from disttrain.report.heat_maps import heat_map
from disttrain.report.line_charts import lines_chart
from disttrain.report.run_record import RunRecord, names_of_all

FEW_LAYERS = 4


def update_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Root mean squares of updates and parameters, and the ratio of the two, by group."""
    titles = {
        "update_rms": "Update RMS",
        "param_rms": "Parameter RMS",
        "update_ratio": "Update over parameter",
    }
    found = []
    for prefix, title in titles.items():
        columns = {f"{prefix}/{group}": group for group in names_of_all(runs, prefix)[:MOST_GROUPS]}
        found.append(lines_chart(runs, title, columns, logarithmic=True, size="third"))
    return [chart for chart in found if chart is not None]


def loss_scale_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The loss scale of fp16, and steps that were skipped."""
    found = [
        lines_chart(runs, "Loss scale", {"loss_scale": "loss scale"}, "count", logarithmic=True),
        lines_chart(
            runs, "Skipped steps", {"skipped_steps": "skipped"}, "count", unit="since the row before", from_zero=True
        ),
    ]
    return [chart for chart in found if chart is not None]


def attention_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The largest attention logit with the threshold of QK-Clip, by layer, and the heads that were rescaled."""
    layers = names_of_all(runs, "max_attention_logit")
    columns = {"max_attention_logit": "largest"}
    if len(runs) == 1 and len(layers) <= FEW_LAYERS:
        columns = {f"max_attention_logit/{layer}": f"layer {layer}" for layer in layers} or columns
    chart = lines_chart(runs, "Largest attention logit", columns, logarithmic=True)
    if chart is None:
        return []
    _add_thresholds(chart, runs)
    heads = lines_chart(runs, "Heads rescaled by QK-Clip", {"qk_clip_heads": "heads"}, unit="per step", from_zero=True)
    charts = [chart] + ([heads] if heads is not None else [])
    return charts + (_layer_maps(runs) if len(layers) > FEW_LAYERS else [])


def _add_thresholds(chart: Chart, runs: Sequence[RunRecord]) -> None:
    """The bound of QK-Clip as a broken line."""
    largest = max(curve.finite().max(initial=0.0) for curve in chart.curves)
    for index, run in enumerate(runs):
        limit, curve = run.setting("optim.qk_clip.threshold"), run.curve("max_attention_logit")
        # A bound far above every logit would only press the curves flat.
        if curve is None or not isinstance(limit, int | float) or "qk_clip_scale" not in run.keys:
            continue
        if limit <= 3 * largest:
            bound = curve.at(np.array([0, -1])).with_values(np.full(2, float(limit)))
            name = "threshold" if len(runs) == 1 else f"{run.label}: threshold"
            colour = NEUTRAL if len(runs) == 1 else colour_of(index)
            shown = {"showlegend": len(runs) == 1, "line": {"dash": "dash", "width": 1.2}}
            chart.traces.append(line(bound, name, index, colour, **shown))


def _layer_maps(runs: Sequence[RunRecord]) -> list[Chart]:
    charts = []
    for index, run in enumerate(runs):
        curves = {
            f"layer {layer}": curve
            for layer in run.names("max_attention_logit")
            if (curve := run.curve(f"max_attention_logit/{layer}")) is not None
        }
        charts.append(heat_map(runs, index, "Largest attention logit by layer", curves))
    return [chart for chart in charts if chart is not None]
