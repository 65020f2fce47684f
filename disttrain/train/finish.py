"""What a run shows at its end: generated text, and the bar that counting would reach."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from disttrain.config import RunConfig
from disttrain.data.loader import SampleOrder, validation_batches
from disttrain.data.source import Data
from disttrain.data.tokenizer import Tokenizer
from disttrain.models import generate_tokens
from disttrain.train.bigram import bigram_loss

BIGRAM_TOKENS = 8_000_000


def sample_text(model: nn.Module, tokenizer: Tokenizer | None, config: RunConfig, device: torch.device) -> str | None:
    """Prompt and continuation, the same on every rank; None where nothing can be decoded or nothing was asked for."""
    if tokenizer is None or not config.monitor.sample_tokens:
        return None
    prompt = [tokenizer.eot_id, *tokenizer.encode_batch([config.monitor.sample_prompt])[0].tolist()]
    (tokens,) = generate_tokens(
        model,
        [prompt],
        config.monitor.sample_tokens,
        max_length=config.train.sequence_length,
        device=device,
        seed=config.train.seed,
    )
    return tokenizer.decode(prompt[1:] + tokens)


def bigram_line(config: RunConfig, data: Data, order: SampleOrder, samples: int) -> str:
    """What an add-k bigram model of the run's own training tokens reaches on the run's own validation windows."""
    length, vocab_size = config.train.sequence_length, config.model.vocab_size or 0
    # Every pair costs eight bytes here: enough to judge by, and no more.
    samples = min(samples, BIGRAM_TOKENS // length)
    training = (order.window(position) for position in range(samples))
    batches = validation_batches(data.validation, length, config.monitor.evaluate_tokens, rank=0, world=1, rows=1)
    validation = [np.append(batch.tokens[0], batch.labels[0, -1]) for batch in batches]
    loss, k = bigram_loss(training, validation, vocab_size)
    line = f"an add-{k:g} bigram model of the same {samples * length:,} training tokens: loss {loss:.4f}"
    if data.bytes_per_token is None:
        return line
    labels = np.concatenate([window[1:] for window in validation])
    return f"{line}, bits per byte {loss * labels.size / math.log(2) / data.bytes_per_token[labels].sum():.4f}"
