"""The result as one HTML file that loads nothing: table, intervals, curves, and what the search has seen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from disttrain import __version__
from disttrain.studies.drawing import colour, curves_svg, intervals_svg
from disttrain.studies.plan import PROTOCOLS, Plan
from disttrain.studies.summary import RowResult
from disttrain.studies.tables import cells, header, notes, warnings

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 16px; color: #222 }
h1 { font-size: 24px } h2 { font-size: 18px; margin-top: 32px }
table { border-collapse: collapse; font-size: 14px }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid #ddd }
td { font-variant-numeric: tabular-nums; white-space: nowrap } .scroll { overflow-x: auto }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px }
.warning { border-left: 4px solid #D55E00; padding-left: 10px } .note { color: #555 }
svg { width: 100%; height: auto; min-width: 640px; max-width: 900px } h1, summary, code { overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } .note { color: #aaa } th, td { border-color: #444 }
}
"""


def page(plan: Plan, results: Sequence[RowResult], command: str) -> str:
    """The whole file; every text of the user's is escaped."""
    small = "" if PROTOCOLS[plan.protocol].claims else " It claims nothing."
    title = f"Optimizers compared: {', '.join(row.label for row in plan.rows if row.searched)}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">Protocol {plan.protocol}.{small} <code>{escape(command)}</code></p>',
        _table(header(plan), [cells(plan, result) for result in results], dots=True),
        *(f'<p class="warning">{escape(warning)}</p>' for warning in warnings(results)),
        *(f'<p class="note">{escape(note)}</p>' for note in notes(plan)),
        "<h2>Differences, seed by seed</h2>",
        _scrolled(intervals_svg(plan, results)),
        "<h2>Curves</h2>",
        _scrolled(curves_svg(plan, results)),
        "<h2>The search</h2>",
        *_searches(results),
        f'<p class="note">Written by disttrain {escape(__version__)}.</p>',
    ]
    return _document(title, "\n".join(body))


def _searches(results: Sequence[RowResult]) -> list[str]:
    found = []
    for result in results:
        if not result.row.searched:
            continue
        lines = [
            [f"{cell.rate:g}", f"{cell.decay:g}", "failed or missing" if loss is None else f"{loss:.4f}"]
            for cell, loss in result.trials
        ]
        table = _table(["lr", "weight decay", "loss"], lines)
        found.append(f"<details><summary>{escape(result.row.label)}</summary>{table}</details>")
    return found


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], dots: bool = False) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ""
    for index, line in enumerate(lines):
        dot = f'<i class="dot" style="background:{colour(index)}"></i>' if dots else ""
        body += (
            "<tr>"
            + "".join(f"<td>{dot if not n else ''}{escape(cell)}</td>" for n, cell in enumerate(line))
            + "</tr>\n"
        )
    return _scrolled(f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>")


def _scrolled(inside: str) -> str:
    """Wider than a phone, and readable there."""
    return f'<div class="scroll">{inside}</div>'


def _document(title: str, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""
