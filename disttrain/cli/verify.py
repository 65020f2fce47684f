"""disttrain verify: the parity table on the user's own machine."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from disttrain.errors import EXIT_DONE, EXIT_FAILED, UserError

if TYPE_CHECKING:
    from disttrain.testing.parity import ParityRow


def verify_command(
    nproc: Annotated[int, typer.Option(help="Largest number of processes to try.")] = 2,
    device: Annotated[str, typer.Option(help="cpu (gloo), cuda (nccl, one process per GPU), or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print every cell as {'rows': [...]}.")] = False,
) -> None:
    """Check that every layout trains as one process does, in fp64, against a naive reference."""
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: there must be at least one process")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: must be cpu, cuda or auto")
    from disttrain.distributed.process_group import select_device
    from disttrain.testing.optimizer_parity import WORLDS as OPTIMIZER_WORLDS
    from disttrain.testing.optimizer_parity import optimizer_table
    from disttrain.testing.parity import WORLDS, parity_table
    from disttrain.testing.pool import RankPool

    worlds = tuple(world for world in WORLDS if world <= nproc)
    layouts: list[ParityRow] = []
    optimizers: list[ParityRow] = []
    progress = Console(stderr=True)
    backend: Literal["cpu", "cuda"] = "cuda" if select_device(device, max(worlds) - 1).type == "cuda" else "cpu"
    with RankPool(max_world=max(worlds), device=backend) as pool:
        small = tuple(world for world in OPTIMIZER_WORLDS if world <= nproc)
        for kept, table in ((layouts, parity_table(pool, worlds)), (optimizers, optimizer_table(pool, small))):
            for row in table:
                kept.append(row)
                if progress.is_terminal:
                    progress.print(f"{len(layouts) + len(optimizers)} cells", end="\r")
    rows = layouts + optimizers
    if as_json:
        print(json.dumps({"rows": [row.contract() for row in rows]}, indent=1))
    else:
        console = Console(soft_wrap=True)
        console.print(_table(layouts))
        if optimizers:
            console.print(_optimizer_table(optimizers))
        for row in rows:
            if not row.passed:
                console.print(f"failed: {row.strategy}, world {row.world}, {row.case}: {row.max_relative_error:.1e}")
    raise typer.Exit(EXIT_DONE if all(row.passed for row in rows) else EXIT_FAILED)


def _table(rows: list[ParityRow]) -> Table:
    """One line per layout, with the worst of its cells."""
    table = Table(title=f"fp64 parity with one process: {sum(row.passed for row in rows)} of {len(rows)} cells passed")
    limits = {row.quantity: f"{row.quantity} (at most {row.tolerance:.0e})" for row in rows}
    for column in ("strategy", "world", "cells", *limits.values(), ""):
        table.add_column(column)
    for (strategy, world), cells in groupby(rows, key=lambda row: (row.strategy, row.world)):
        layout = list(cells)
        errors = [max(row.max_relative_error for row in layout if row.quantity == name) for name in limits]
        verdict = "[green]passed[/green]" if all(row.passed for row in layout) else "[bold red]FAILED[/bold red]"
        table.add_row(strategy, str(world), str(len(layout)), *(f"{e:.1e}" for e in errors), verdict)
    return table


def _optimizer_table(rows: list[ParityRow]) -> Table:
    """One line per algorithm or clipping and world, with the worst of its cells over strategies."""
    table = Table(title=f"optimizers and clipping: {sum(row.passed for row in rows)} of {len(rows)} cells passed")
    kinds = {row.case.rsplit(", ", 1)[1]: row.tolerance for row in rows}
    for column in ("", "world", *(f"{kind} (at most {tolerance:.0e})" for kind, tolerance in kinds.items()), ""):
        table.add_column(column)
    for name in dict.fromkeys(row.case.rsplit(", ", 1)[0] for row in rows):
        for world in dict.fromkeys(row.world for row in rows):
            cells = [row for row in rows if row.world == world and row.case.startswith(f"{name}, ")]
            errors = {kind: [row.max_relative_error for row in cells if row.case.endswith(kind)] for kind in kinds}
            shown = [f"{max(found):.1e}" if found else "" for found in errors.values()]
            passed = all(row.passed for row in cells)
            table.add_row(
                name, str(world), *shown, "[green]passed[/green]" if passed else "[bold red]FAILED[/bold red]"
            )
    return table
