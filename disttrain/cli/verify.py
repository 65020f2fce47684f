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
    from collections.abc import Iterator

    from disttrain.testing.parity import ParityRow
    from disttrain.testing.pool import RankPool


def verify_command(
    nproc: Annotated[int, typer.Option(help="Largest number of processes to try.")] = 2,
    device: Annotated[str, typer.Option(help="cpu (gloo), cuda (nccl, one process per GPU), or auto.")] = "auto",
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="Only this algorithm: a name, a class (package.Class) or a function (package.module:update)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every cell as {'rows': [...]}.")] = False,
) -> None:
    """Check that every layout trains as one process does, in fp64, against a naive reference."""
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: there must be at least one process")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: must be cpu, cuda or auto")
    from disttrain.distributed.process_group import select_device
    from disttrain.testing.pool import RankPool

    layouts: list[ParityRow] = []
    optimizers: list[ParityRow] = []
    progress = Console(stderr=True)
    backend: Literal["cpu", "cuda"] = "cuda" if select_device(device, min(nproc, 8) - 1).type == "cuda" else "cpu"
    with RankPool(max_world=min(nproc, 8), device=backend) as pool:
        for table, rows_of in _tables(pool, nproc, optimizer):
            for row in rows_of:
                (layouts if table == "layouts" else optimizers).append(row)
                if progress.is_terminal:
                    progress.print(f"{len(layouts) + len(optimizers)} cells", end="\r")
    rows = layouts + optimizers
    if as_json:
        print(json.dumps({"rows": [row.contract() for row in rows]}, indent=1))
    else:
        _print_tables(layouts, optimizers)
    raise typer.Exit(EXIT_DONE if all(row.passed for row in rows) else EXIT_FAILED)


def _print_tables(layouts: list[ParityRow], optimizers: list[ParityRow]) -> None:
    console = Console(soft_wrap=True)
    if layouts:
        console.print(_table(layouts))
    if optimizers:
        console.print(_optimizer_table(optimizers))
    for row in (*layouts, *optimizers):
        if not row.passed:
            console.print(f"failed: {row.strategy}, world {row.world}, {row.case}: {row.max_relative_error:.1e}")


def _tables(pool: RankPool, nproc: int, optimizer: str | None) -> Iterator[tuple[str, Iterator[ParityRow]]]:
    """Every table up to `nproc` processes, or those that know `optimizer`. Raises UserError for one that none knows."""
    from disttrain.testing import clip_parity, matrix_parity, optimizer_parity, parity

    def up_to(worlds: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(world for world in worlds if world <= nproc)

    whole = optimizer is not None and (":" in optimizer or optimizer in matrix_parity.ALGORITHMS)
    if optimizer is not None and not whole and "." not in optimizer and optimizer not in optimizer_parity.ALGORITHMS:
        known = ", ".join((*optimizer_parity.ALGORITHMS, *matrix_parity.ALGORITHMS))
        raise UserError(
            f"--optimizer {optimizer}: not known; there are {known}, package.Class and package.module:update"
        )
    if optimizer is not None and nproc < 2:
        raise UserError(f"--optimizer {optimizer}: one process has nothing to compare with; set --nproc 2, 4 or 8")
    if optimizer is not None:
        matrix_parity.check_importable(optimizer)
    if optimizer is None:
        yield "layouts", parity.parity_table(pool, up_to(parity.WORLDS))
    if not whole:
        yield "optimizers", optimizer_parity.optimizer_table(pool, up_to(optimizer_parity.WORLDS), optimizer)
    if whole or optimizer is None:
        yield "optimizers", matrix_parity.matrix_table(pool, up_to(matrix_parity.WORLDS), optimizer)
    if optimizer is None:
        yield "optimizers", clip_parity.clip_table(pool, up_to(clip_parity.WORLDS))


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
    table.add_column("", overflow="fold")
    for column in ("world", *(f"{kind} (at most {tolerance:.0e})" for kind, tolerance in kinds.items()), ""):
        table.add_column(column)
    for name in dict.fromkeys(row.case.rsplit(", ", 1)[0] for row in rows):
        of_name = [row for row in rows if row.case.startswith(f"{name}, ")]
        for world in sorted({row.world for row in of_name}):
            cells = [row for row in of_name if row.world == world]
            errors = {kind: [row.max_relative_error for row in cells if row.case.endswith(kind)] for kind in kinds}
            shown = [f"{max(found):.1e}" if found else "" for found in errors.values()]
            passed = all(row.passed for row in cells)
            table.add_row(
                name, str(world), *shown, "[green]passed[/green]" if passed else "[bold red]FAILED[/bold red]"
            )
    return table
