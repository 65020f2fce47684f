"""The command `disttrain`: bad input leaves with one line per problem and exit code 2, never with a traceback."""

from __future__ import annotations

import sys

import typer

from disttrain.cli.config import config_command
from disttrain.cli.evaluate import evaluate_command
from disttrain.cli.generate import generate_command
from disttrain.cli.train import train_command
from disttrain.cli.verify import verify_command
from disttrain.errors import EXIT_BAD_INPUT, UserError

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


def main() -> None:
    try:
        app()
    except UserError as error:
        print_problems(error)
        sys.exit(EXIT_BAD_INPUT)


def print_problems(error: UserError) -> None:
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
