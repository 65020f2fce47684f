"""Tables and small pieces of HTML. Everything that comes from a run folder goes through `text`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def text(value: object) -> str:
    """As it is, for HTML."""
    return html.escape(str(value))


def table(header: Sequence[object], rows: Iterable[Sequence[object]], *, numeric: Sequence[int] = ()) -> str:
    """All cells are plain text; those of `numeric` columns stand to the right."""
    aligned = [' class="number"' if index in numeric else "" for index in range(len(header))]
    head = "".join(f"<th{how}>{text(cell)}</th>" for cell, how in zip(header, aligned, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{how}>{text(cell)}</td>" for cell, how in zip(row, aligned, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def by_run(labels: Sequence[str], rows: Iterable[tuple[str, Sequence[object]]], colours: Sequence[str] = ()) -> str:
    """A column per run: what each line is called, then one cell per run."""
    dots = [f'<i class="dot" style="background:{colour}"></i>' for colour in colours] or [""] * len(labels)
    head = "".join(f"<th>{dot}{text(label)}</th>" for dot, label in zip(dots, labels, strict=True))
    body = "\n".join(
        f'<tr><th scope="row">{text(name)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>"
        for name, cells in rows
    )
    head = f"<thead><tr><th></th>{head}</tr></thead>" if len(labels) > 1 else ""
    return f'<div class="scroll"><table class="by-run">{head}<tbody>\n{body}\n</tbody></table></div>'


def details(summary: str, inner: str, *, opened: bool = False, note: str = "") -> str:
    """Something to open; `inner` is HTML, the rest plain text."""
    more = f' <span class="soft">{text(note)}</span>' if note else ""
    return f"<details{' open' if opened else ''}><summary>{text(summary)}{more}</summary>\n{inner}\n</details>"


def pre(content: object) -> str:
    return f"<pre>{text(content)}</pre>"


def paragraph(content: object) -> str:
    return f'<p class="note">{text(content)}</p>'
