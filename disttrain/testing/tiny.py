"""A run of seconds, for tests and benchmarks that look at everything but the model. No torch here."""

from __future__ import annotations

from pathlib import Path

TINY = """
device = "cpu"
[model]
n_layers = 1
d_model = 16
n_heads = 2
[data]
source = "synthetic"
tokenizer = "bytes"
cache_dir = "{cache}"
[train]
steps = 40
global_batch_tokens = 256
microbatch_size = 2
sequence_length = 32
[schedule]
warmup_steps = 4
horizon_steps = 40
[checkpoint]
every = 20
[monitor]
log_every = 1
evaluate_every = 20
evaluate_tokens = 512
sample_tokens = 8
"""


def write_tiny(folder: Path, more: str = "", cache: Path | None = None) -> Path:
    """A config in `folder` that trains 40 steps in about a second, with what the TOML text `more` says otherwise.

    `train.steps` may change: the schedule does not follow it. Tokens go to `cache`, or to `folder`/cache.
    """
    base = folder / "tiny.toml"
    base.write_text(TINY.format(cache=cache or folder / "cache"))
    if not more:
        return base
    config = folder / "config.toml"
    config.write_text(f'extends = "{base.name}"\n{more}')
    return config
