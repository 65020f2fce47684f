"""disttrain evaluate: validation loss of a run's newest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from disttrain.cli.saved_run import open_run


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Validation tokens; default: the run's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the run's.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Evaluate on the run's validation text."""
    saved = open_run(run, device)

    from disttrain.data.loader import validation_batches
    from disttrain.train.evaluate import evaluate
    from disttrain.train.preflight import open_config_data

    data, train = open_config_data(saved.config), saved.config.train
    wanted = tokens or saved.config.monitor.evaluate_tokens
    batches = validation_batches(data.validation, train.sequence_length, wanted, 0, 1, train.microbatch_size)
    result = evaluate(saved.model, batches, data.bytes_per_token, saved.device)
    if as_json:
        names = {"validation_loss": result.loss, "validation_bits_per_byte": result.bits_per_byte}
        print(json.dumps({"step": saved.step, "tokens": result.tokens, **names}))
        return
    shown = "n/a (no tokenizer)" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    print(f"step {saved.step}: loss {result.loss:.4f}, bits per byte {shown}, over {result.tokens:,} tokens")
