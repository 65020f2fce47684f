"""disttrain report: run folders as one HTML page. Starts without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from disttrain.errors import UserError

FILE_NAME = "report.html"


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, such as runs/NAME.")],
    output: Annotated[
        Path | None, typer.Option(help="The file to write; default: report.html in the folder of one run, or here.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The heading; default: the name of the run.")] = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    from disttrain.report import build_page, read_runs, write_page

    # With one bad run folder the default output would be in it: its own problem says enough.
    problems = _output_problems(output) if output is not None else []
    try:
        found = read_runs(runs)
    except UserError as error:
        raise UserError([*error.problems, *problems]) from None
    if output is None:
        output = runs[0] / FILE_NAME if len(runs) == 1 else Path(FILE_NAME)
        problems = _output_problems(output)
    if problems:
        raise UserError(problems)
    page = build_page(found, title)
    size = write_page(page, output)
    noun = "run" if len(found) == 1 else "runs"
    print(f"{output}: {size / 1e6:.1f} MB, {len(found)} {noun}, {page.charts} charts; open it in any browser")


def _output_problems(output: Path) -> list[str]:
    """Found before anything is read or computed."""
    folder = output.parent
    try:
        if output.is_dir():
            return [f"--output {output}: is a folder; name a file in it, such as {output / FILE_NAME}"]
        if not folder.is_dir():
            return [f"--output {output}: there is no folder {folder}; make it, or name another file"]
    except OSError as error:
        return [f"--output {output}: {error.strerror}; name another file"]
    if not os.access(folder, os.W_OK):
        return [f"{output}: the folder {folder} is not writable; set --output to a file elsewhere"]
    return []
