"""The command `disttrain`: bad input leaves with one line per problem and exit code 2, never with a traceback."""

from __future__ import annotations

import io
import sys
from contextlib import suppress

import typer

from disttrain.cli.checkpoint import checkpoint_app
from disttrain.cli.compare import compare_command
from disttrain.cli.config import config_command
from disttrain.cli.doctor import doctor_command
from disttrain.cli.evaluate import evaluate_command
from disttrain.cli.generate import generate_command
from disttrain.cli.launch import launch_command
from disttrain.cli.problems import leave_with_problems
from disttrain.cli.report import report_command
from disttrain.cli.train import train_command
from disttrain.cli.verify import verify_command
from disttrain.distributed.env import Ranks, read_ranks
from disttrain.errors import UserError

app = typer.Typer(
    name="disttrain",
    help="Distributed training of GPT-style models, exact on every layout.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.command("config")(config_command)
app.command("generate")(generate_command)
app.command("evaluate")(evaluate_command)
app.command("verify")(verify_command)
app.command("doctor")(doctor_command)
app.command("report")(report_command)
app.command("launch")(launch_command)
app.command("compare")(compare_command)
app.add_typer(checkpoint_app, name="checkpoint")


def main() -> None:
    # Generated text may hold what a terminal's encoding cannot show; that must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except UserError as error:
        leave_with_problems(error, _ranks())


def _ranks() -> Ranks:
    """Who speaks; a broken environment is among the errors, and then everybody does."""
    with suppress(UserError):
        return read_ranks() or Ranks()
    return Ranks()
