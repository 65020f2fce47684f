"""disttrain generate: text from a run's newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from disttrain.cli.saved_run import open_run
from disttrain.data.tokenizer import Tokenizer
from disttrain.errors import UserError


def generate_command(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="The text to continue; repeat it to continue several. Default: a line break."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add to each.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=1e-6, max=1.0, help="Keep the likeliest up to this share.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="The same seed gives the same text.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the run's.")] = None,
) -> None:
    """Continue one prompt or several."""
    tokenizer_file = run / "tokenizer.json"
    if (run / "config.json").is_file() and not tokenizer_file.is_file():
        raise UserError(f"{run}: no tokenizer.json, so the tokens have no text (token files without data.tokenizer)")
    saved = open_run(run, device)

    from disttrain.models import generate_tokens

    tokenizer = Tokenizer.load(tokenizer_file)
    starts = [[tokenizer.eot_id, *ids.tolist()] for ids in tokenizer.encode_batch(prompt or ["\n"])]
    generated = generate_tokens(
        saved.model,
        starts,
        tokens,
        max_length=saved.config.train.sequence_length,
        device=saved.device,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    texts = [tokenizer.decode(start[1:] + more) for start, more in zip(starts, generated, strict=True)]
    if len(texts) > 1:
        texts = [f"--- prompt {number}\n{text}" for number, text in enumerate(texts, 1)]
    print("\n\n".join(texts))
