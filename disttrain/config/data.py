"""What the run reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from disttrain.config.base import OpenFraction, Section


class DataConfig(Section):
    """Text from Python's own standard library unless `path` names files of yours."""

    source: Literal["stdlib", "synthetic"] = "stdlib"
    path: Annotated[str, Field(min_length=1)] | None = None
    """A file or folder of .txt or .jsonl (key "text"), or .bin tokens (nanoGPT, modded-nanogpt). Beats `source`."""
    tokenizer: Annotated[str, Field(min_length=1)] = "bpe"
    """`bpe` (byte-level, trained on the corpus), `bytes`, or the path of a tokenizer.json."""
    vocab_size: Annotated[int, Field(ge=257, le=1_000_000)] = 1024
    """Entries of the trained `bpe` tokenizer."""
    validation_fraction: OpenFraction = 0.1
    """Of files at `path`; the built-in sources always hold out a tenth."""
    cache_dir: str = "~/.cache/disttrain"
