"""Line charts as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Points = Sequence[tuple[float, float]]
PALETTE = ("#c2571a", "#1f5fa8", "#3d8c40", "#7a4fa3", "#8a6d00", "#b0305c", "#4a4a4a")
_TEXT = 'font-family="sans-serif" font-size="12" fill="#333"'
_WIDTH, _HEIGHT = 600, 324


def line_chart(
    title: str,
    across: str,
    lines: Mapping[str, Points],
    *,
    tick: Callable[[float], str] = "{:g}".format,
    log: bool = False,
    marks: Sequence[float] = (),
    dots: bool = False,
) -> str:
    """Curves by name: x to the right, from 0 or from the first, y upwards (`log`: by powers of ten); `marks` are x that
    stand out.

    Colours follow the order of the names, so that charts of the same names agree.
    """
    scale: Callable[[float], float] = math.log10 if log else float
    points = [point for line in lines.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    left = left if left > right / 4 else 0.0
    values = [scale(y) for _, y in points]
    low, high = min(values), max(values)
    low, high = (math.floor(low), math.ceil(high)) if log else (low - 0.05 * (high - low), high + 0.05 * (high - low))

    def place(x: float, scaled: float) -> tuple[str, str]:
        return f"{60 + 520 * (x - left) / (right - left):.1f}", f"{20 + 260 * (high - scaled) / (high - low):.1f}"

    shapes = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>']
    for mark in marks:
        x = place(mark, low)[0]
        shapes.append(f'<line x1="{x}" x2="{x}" y1="20" y2="280" stroke="#eec"/>')
    steps = int(high - low) if log else 4
    for step in range(steps + 1):
        value = low + (high - low) * step / steps
        y, said = place(left, value)[1], f"{10**value:g}" if log else f"{value:.2f}"
        shapes.append(f'<line x1="60" x2="580" y1="{y}" y2="{y}" stroke="#ddd"/>')
        shapes.append(f'<text x="52" y="{y}" text-anchor="end" dominant-baseline="middle" {_TEXT}>{said}</text>')
    for step in range(5):
        value = left + (right - left) * step / 4
        x = place(value, low)[0]
        shapes.append(f'<text x="{x}" y="298" text-anchor="middle" {_TEXT}>{tick(value)}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = PALETTE[number % len(PALETTE)]
        path = [place(x, scale(y)) for x, y in line]
        joined = " ".join(",".join(point) for point in path)
        shapes.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if dots:
            shapes += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in path]
        shapes.append(f'<text x="400" y="{36 + 16 * number}" {_TEXT} style="fill:{colour}">{name}</text>')
    shapes.append(f'<text x="320" y="316" text-anchor="middle" {_TEXT}>{across}</text>')
    shapes.append(f'<text x="60" y="14" {_TEXT}>{title}</text>')
    inside = "\n".join(shapes)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">\n{inside}\n</svg>\n'
