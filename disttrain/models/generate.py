"""Sampling text, one token of each prompt at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disttrain.models.kv_cache import KVCache


def sampling_probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities [vocab] of the next token from `logits` [vocab]; temperature 0 puts all on the largest.

    `top_k` keeps the k most probable tokens; `top_p` the fewest whose probabilities reach p (arXiv 1904.09751).
    """
    logits = logits.double()
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    # The largest becomes zero first: a tiny temperature then gives minus infinities, never a NaN.
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=0)
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
    prompts: list[list[int]],
    count: int,
    *,
    max_length: int,
    device: torch.device,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """`count` tokens that continue each of `prompts`: for prompt i those that it gets alone with the seed `seed` + i.

    Keys and values are kept while the longest prompt and what was generated fit into `max_length`: a pass computes one
    new token per prompt. From there on every token kept would move to another position, so that each pass computes the
    last `max_length` tokens anew.

    Always exactly `count` forward passes: under FSDP every rank has to make them together, with the same arguments.
    """
    if not prompts or not all(prompts):
        raise ValueError("each prompt needs at least one token to continue: begin it with the end-of-text token")
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    rows = [list(prompt) for prompt in prompts]
    cache = None
    for _ in range(count):
        if cache is None or max(map(len, rows)) > max_length:
            tokens, cache = _left_padded(rows, max_length, device)
        else:
            tokens = torch.tensor([row[-1:] for row in rows], device=device)
        # Passes differ in shape: compiled blocks would compile again, which takes longer than the text.
        with torch.compiler.set_stance("force_eager"):
            last_logits = model(tokens, None, cache)[:, -1].cpu()
        for row, logits, generator in zip(rows, last_logits, generators, strict=True):
            probabilities = sampling_probabilities(logits, temperature, top_k, top_p)
            row.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _left_padded(rows: list[list[int]], max_length: int, device: torch.device) -> tuple[Tensor, KVCache]:
    """The last `max_length` tokens of each row, padded on the left to one length, and an empty cache for them."""
    windows = [row[-max_length:] for row in rows]
    length = max(map(len, windows))
    padding = [length - len(window) for window in windows]
    # The padding is token 0, which every vocabulary has; no token sees it.
    tokens = [[0] * pad + window for pad, window in zip(padding, windows, strict=True)]
    return torch.tensor(tokens, device=device), KVCache(torch.tensor(padding, device=device))
