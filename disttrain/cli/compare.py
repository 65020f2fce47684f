"""disttrain compare: optimizers on the user's own data, by a method with rules."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from disttrain.cli.problems import leave_with_problems
from disttrain.cli.train import start_run
from disttrain.config import RunConfig
from disttrain.config.load import load_config
from disttrain.distributed.env import Ranks, read_ranks
from disttrain.errors import EXIT_FAILED, EXIT_PREEMPTED, UserError
from disttrain.launching.parent import die_with_parent
from disttrain.resilience import StopRequest, heard_signals
from disttrain.studies.cells import cell_config
from disttrain.studies.drawing import curves_svg
from disttrain.studies.estimate import estimated_seconds
from disttrain.studies.folder import ComparisonFolder
from disttrain.studies.page import page
from disttrain.studies.plan import Plan
from disttrain.studies.request import Request, build_plan
from disttrain.studies.runner import Runner, StoppedError
from disttrain.studies.stages import rate_trials
from disttrain.studies.summary import RowResult, summarise
from disttrain.studies.tables import as_json, cells, header, markdown, notes, warnings
from disttrain.train.preflight import prepare_run

LOOK_SECONDS = 0.2
WIDE = 200


def compare_command(
    config: Annotated[Path, typer.Argument(help="A TOML file: model, data, batch, schedule, clipping for all.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    optimizers: Annotated[
        str | None,
        typer.Option(
            help="Names with commas between them, the baseline first: presets, package.Class, package.module:update."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Budget of every run; default: the config's.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Of the second stage; the search has one of its own.")] = None,
    protocol: Annotated[str, typer.Option(help="smoke, small or track3.")] = "small",
    batch_law: Annotated[
        bool, typer.Option("--batch-law", help="Rows with 4 and 16 times the batch under each batch_lr_rule.")
    ] = False,
    search: Annotated[str, typer.Option(help="rate-first (then decays at the best rate), or grid (all pairs).")] = (
        "rate-first"
    ),
    rate_factors: Annotated[
        str | None, typer.Option(help="Rates to try, as multiples of each optimizer's own.")
    ] = None,
    decay_factors: Annotated[str | None, typer.Option(help="The same for weight decays.")] = None,
    rates: Annotated[list[str] | None, typer.Option(help="Rates of one optimizer: lion=1e-4,3e-4,1e-3.")] = None,
    decays: Annotated[list[str] | None, typer.Option(help="Weight decays of one optimizer: lion=0,0.3,1.")] = None,
    target: Annotated[float | None, typer.Option(help="Validation loss to reach, for track3.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Default: runs/NAME-compare, NAME as of the config.")] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Print and store the plan, train nothing.")] = False,
) -> None:
    """Compare optimizers: equal budgets and searches, several seeds, verdicts with intervals."""
    if read_ranks() is not None:
        raise UserError("disttrain compare starts its runs itself: call it without a launcher, on each machine once")
    base = load_config(config, overrides or []).config
    request = Request(
        protocol, search, optimizers, tokens, seeds, target, batch_law, rate_factors, decay_factors,
        tuple(rates or ()), tuple(decays or ()), tuple(overrides or ()),
    )  # fmt: skip
    plan = build_plan(request, base)
    place = ComparisonFolder(folder or Path("runs") / f"{base.run.name}-compare")
    place.check(plan)
    _check_own_optimizers(plan)
    first = rate_trials(plan, plan.baseline)[0]
    prepare_run(cell_config(base, plan, first, str(place.cell(first))))
    command = "disttrain " + shlex.join(sys.argv[1:])
    seconds = estimated_seconds(base, plan)
    place.write_plan(plan, command, seconds)
    for line in plan.lines():
        print(line)
    print(_time(seconds, place), flush=True)
    if plan_only:
        return
    results = _run(base, plan, place)
    _write(plan, results, place, command)
    whole = all(len(result.losses) == len(plan.seeds) for result in results)
    raise typer.Exit(0 if whole else EXIT_FAILED)


def _time(seconds: float | None, place: ComparisonFolder) -> str:
    if seconds is None:
        return f"how long it takes on GPUs is known after the first run; all of it in {place.path}"
    said = f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:,.0f} seconds"
    return (
        f"estimated for this processor, from a matrix product: {said}, or a few times that; all of it in {place.path}"
    )


def _check_own_optimizers(plan: Plan) -> None:
    """Those that the user wrote are tried on toys first. UserError when they cannot work."""
    own = [row.optimizer for row in plan.rows if ":" in row.optimizer or "." in row.optimizer]
    if own:
        from disttrain.testing.matrix_parity import check_importable

        for name in own:
            check_importable(name)


def _run(base: RunConfig, plan: Plan, place: ComparisonFolder) -> list[RowResult]:
    with StopRequest() as stop:
        runner = Runner(base, plan, place, partial(_train, stop), partial(print, flush=True), lambda: stop.wanted)
        try:
            runner.run()
        except StoppedError:
            print(f"stopped on request; start again to go on, {place.path}", flush=True)
            raise typer.Exit(EXIT_PREEMPTED) from None
    return summarise(plan, runner.outcomes, runner.failed)


def _train(stop: StopRequest, config: RunConfig, log: Path) -> None:
    """In a process of its own, whose end is no end of ours. A request to stop is passed on."""
    import disttrain.train.run  # noqa: F401  forked runs find torch imported

    child = multiprocessing.get_context("fork").Process(target=_child, args=(partial(start_run, config), log))
    child.start()
    told = False
    while child.exitcode is None:
        child.join(LOOK_SECONDS)
        if stop.wanted and not told:
            told = True
            child.terminate()


def _child(start: Callable[[], int], log: Path) -> None:
    """`disttrain train` of one cell; a comparison that is killed takes it along."""
    die_with_parent()
    for number in heard_signals():
        signal.signal(number, signal.SIG_DFL)  # ours only set a wish that this process has no look at
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        code = start()
    except UserError as error:
        leave_with_problems(error, Ranks())
    sys.stdout.flush()
    os._exit(code)


def _write(plan: Plan, results: list[RowResult], place: ComparisonFolder, command: str) -> None:
    text = markdown(plan, results, command)
    place.write("result.json", as_json(plan, results, command))
    place.write("table.md", text)
    place.write("compare.svg", curves_svg(plan, results))
    place.write("compare.html", page(plan, results, command))
    table = Table(title=f"against {plan.baseline.label}, protocol {plan.protocol}")
    for column in header(plan):
        table.add_column(column)
    for result in results:
        table.add_row(*cells(plan, result))
    # A file has no width, and a table that is folded to 80 columns cannot be read.
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    for line in (*notes(plan), *(f"warning: {warning}" for warning in warnings(results))):
        print(line)
    print(f"{place.path}: result.json, table.md, compare.svg, compare.html")
