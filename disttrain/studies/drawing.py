"""Charts as SVG, without a plotting library: curves against tokens and time, and intervals beside a line at zero."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from disttrain.studies.plan import Plan
from disttrain.studies.statistics import Interval
from disttrain.studies.summary import RowResult

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
"""Okabe and Ito's, told apart by the colour-blind; a ninth row begins again, with dashes."""
_TEXT = 'font-family="sans-serif" font-size="12" fill="#333"'
_HIGH, _TOP = 300, 34
_PANEL, _GAP, _LEFT = 380, 66, 58
_LETTER = 7.0
"""Width of a letter, rather too wide than too narrow: names are of any length."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Axis:
    """From values to places: `low` lies at `start`, `high` at `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values within it."""
        rough = (self.high - self.low) / about or 1.0
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, first + 2 * about + 2) if n * step <= self.high + 1e-9 * step]


def colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def curves_svg(plan: Plan, results: Sequence[RowResult]) -> str:
    """Validation loss, the mean over seeds: to the left against tokens, to the right against time."""
    drawn = [(index, result) for index, result in enumerate(results) if len(result.curve) > 1]
    if not drawn:
        return _svg(_PANEL, 60, [_label(20, 34, "no run of the second stage has ended")])
    low, high = _loss_range([result for _, result in drawn])
    tokens = {index: [(t / plan.tokens, loss) for t, loss in result.curve] for index, result in drawn}
    times = {
        index: [(x * result.step_ratio, loss) for x, loss in tokens[index]]
        for index, result in drawn
        if result.step_ratio is not None
    }
    panels = ((tokens, f"share of {plan.tokens:,} tokens"), (times, f"time, in runs of {plan.baseline.label}"))
    shapes = []
    for place, (lines, across) in enumerate(panels):
        left = _LEFT + place * (_PANEL + _GAP)
        shapes += _panel(lines, across, (left, left + _PANEL), (low, high))
    shapes.append(_label(_LEFT, 18, "validation loss, mean over seeds"))
    width = 2 * _LEFT + 2 * _PANEL + _GAP - 30
    names = [result.row.label for result in results]
    columns = max(1, min(4, int((width - _LEFT) / (_wide(names) + 44))))
    shapes += _legend(names, _TOP + _HIGH + 58, (width - _LEFT) / columns, columns)
    rows = -(-len(results) // columns)
    return _svg(width, _TOP + _HIGH + 60 + 20 * rows, shapes)


def _loss_range(results: Sequence[RowResult]) -> tuple[float, float]:
    """From the lowest to where the first evaluations are: what diverges leaves by the top."""
    ends = [loss for result in results for _, loss in result.curve]
    firsts = sorted(result.curve[0][1] for result in results)
    low, high = min(ends), firsts[len(firsts) // 2]
    high = max(high, min(max(ends), low + 1.5 * (high - low)))
    room = 0.04 * ((high - low) or 1.0)
    return low - room, high + room


def _panel(
    lines: dict[int, list[tuple[float, float]]], across: str, place: tuple[float, float], span: tuple[float, float]
) -> list[str]:
    right = max((x for points in lines.values() for x, _ in points), default=1.0)
    x, y = _Axis(0.0, right, *place), _Axis(*span, _TOP + _HIGH, _TOP)
    shapes = []
    for value in y.ticks():
        shapes.append(_line((x.start, y(value)), (x.stop, y(value)), 'stroke="#ddd"'))
        shapes.append(_label(x.start - 8, y(value) + 4, f"{value:g}", "end"))
    shapes += [_label(x(value), _TOP + _HIGH + 18, f"{value:g}", "middle") for value in x.ticks()]
    shapes.append(_label((x.start + x.stop) / 2, _TOP + _HIGH + 36, across, "middle"))
    clip = f"panel-{int(x.start)}"
    inside = f'<rect x="{x.start}" y="{_TOP}" width="{x.stop - x.start}" height="{_HIGH}"/>'
    shapes.append(f'<clipPath id="{clip}">{inside}</clipPath>')
    for index, points in lines.items():
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
        dash = ' stroke-dasharray="6 3"' if index >= len(PALETTE) else ""
        shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{colour(index)}" stroke-width="2"{dash} '
            f'clip-path="url(#{clip})"/>'
        )
    return shapes


def _wide(names: Sequence[str]) -> float:
    return _LETTER * max(map(len, names))


def _legend(names: Sequence[str], top: float, column: float, columns: int) -> list[str]:
    shapes = []
    for index, name in enumerate(names):
        left, y = _LEFT + column * (index % columns), top + 20 * (index // columns)
        dash = ' stroke-dasharray="6 3"' if index >= len(PALETTE) else ""
        shapes.append(_line((left, y), (left + 22, y), f'stroke="{colour(index)}" stroke-width="3"{dash}'))
        shapes.append(_label(left + 28, y + 4, name))
    return shapes


def intervals_svg(plan: Plan, results: Sequence[RowResult]) -> str:
    """Each row's loss less the baseline's with its interval, and the seeds' own differences as dots."""
    rows: list[tuple[int, RowResult, Interval]] = []
    for index, result in enumerate(results):
        found = result.difference.interval if result.difference else None
        if found is not None and math.isfinite(found.mean):
            rows.append((index, result, found))
    if not rows:
        return _svg(_PANEL, 60, [_label(20, 34, "nothing to compare yet")])
    base = results[0].losses
    ends = [v for _, _, found in rows for v in (found.low, found.high, found.mean) if v is not None] + [0.0]
    room = 0.05 * (max(ends) - min(ends) or 1.0)
    left = max(190.0, _wide([result.row.label for _, result, _ in rows]) + 20)
    x, bottom = _Axis(min(ends) - room, max(ends) + room, left, left + 570), 24 + 30 * len(rows)
    shapes = [_label(x(value), bottom + 18, f"{value:+g}" if value else "0", "middle") for value in x.ticks(6)]
    shapes.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="14" y2="{bottom}" stroke="#999" stroke-dasharray="3 3"/>')
    shapes.append(
        _label(
            left + 285,
            bottom + 38,
            f"loss less {plan.baseline.label}'s: better to the left, worse to the right",
            "middle",
        )
    )
    for line, (index, result, found) in enumerate(rows):
        y, ink = 30 + 30 * line, colour(index)
        shapes.append(_label(left - 10, y + 4, result.row.label, "end"))
        if found.low is not None and found.high is not None:
            shapes.append(_line((x(found.low), y), (x(found.high), y), f'stroke="{ink}" stroke-width="3"'))
        for seed, loss in result.losses.items():
            if seed in base and math.isfinite(loss - base[seed]):
                shapes.append(f'<circle cx="{x(loss - base[seed]):.1f}" cy="{y}" r="3" fill="none" stroke="{ink}"/>')
        shapes.append(f'<circle cx="{x(found.mean):.1f}" cy="{y}" r="5" fill="{ink}"/>')
    return _svg(left + 610, bottom + 50, shapes)


def _line(begin: tuple[float, float], end: tuple[float, float], style: str) -> str:
    return f'<line x1="{begin[0]:.1f}" x2="{end[0]:.1f}" y1="{begin[1]:.1f}" y2="{end[1]:.1f}" {style}/>'


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_TEXT}>{html.escape(text)}</text>'


def _svg(width: float, height: float, shapes: Sequence[str]) -> str:
    inside = "\n".join([f'<rect width="{width}" height="{height}" fill="#fff"/>', *shapes])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">\n{inside}\n</svg>\n'
