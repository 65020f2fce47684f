"""Sampling text, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sampling_probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities [vocab] of the next token from `logits` [vocab]; temperature 0 puts all on the largest.

    `top_k` keeps the k most probable tokens; `top_p` the fewest whose probabilities reach p (arXiv 1904.09751).
    """
    logits = logits.double()
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    probabilities = torch.softmax(logits / temperature, dim=0)
    ordered, order = probabilities.sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        keep[top_k:] = False
    if top_p is not None:
        # The token that crosses p is kept, so that at least one always is.
        keep &= ordered.cumsum(0) - ordered < top_p
    return torch.zeros_like(probabilities).index_put_((order[keep],), ordered[keep] / ordered[keep].sum())


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    prompt: list[int],
    count: int,
    *,
    max_length: int,
    device: torch.device,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[int]:
    """`count` tokens that continue `prompt` (at least one token); the model sees the last `max_length` tokens.

    Always exactly `count` forward passes: under FSDP every rank has to make them together, with the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        window = torch.tensor([tokens[-max_length:]], device=device)
        logits = model(window)[0, -1].cpu()
        probabilities = sampling_probabilities(logits, temperature, top_k, top_p)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return tokens[len(prompt) :]
