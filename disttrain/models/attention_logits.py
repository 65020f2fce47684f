"""Causal attention that also tells its largest logit: the scaled score of a query with a key that it sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 128
"""Queries whose scores the exact pass holds at once."""


class LogitWatch:
    """The largest logit of each head over all forward passes since `reset`: [heads], fp32 or finer, on the device.

    `method` is bound, exact or flex; flex prepares for sequences of `length`. A forward that is computed again for its
    activations changes nothing: a maximum counts a number twice as it counts it once.
    """

    def __init__(
        self,
        heads: int,
        method: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        length: int | None = None,
    ) -> None:
        self.method = method
        # Made here and not in the forward: a compiled block would make it anew every time.
        self.blocks = _causal_blocks(length, device) if method == "flex" and length else None
        self.maxima = torch.full((heads,), -math.inf, device=device, dtype=dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q [batch, heads, length, width], with fewer heads in k and v where they are shared."""
        y, largest = attend_with_flex(q, k, v, self.blocks) if self.method == "flex" else METHODS[self.method](q, k, v)
        with torch.no_grad():
            self.maxima.copy_(torch.maximum(self.maxima, largest.detach().to(self.maxima.dtype)))
        return y

    def reset(self) -> None:
        self.maxima.fill_(-math.inf)


def attend_with_bound(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """CPU: the kernel of torch's own attention, and from its log-sum-exp what the maximum is at most; too high by at
    most log(length), and hardly at all for a head that looks at one key."""
    y, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return y, log_sum_exp.amax((0, 2))


def attend_with_exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Any device: torch's attention, and a second pass over queries and keys."""
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y, largest_logits(q.detach(), k.detach())


def attend_with_flex(q: Tensor, k: Tensor, v: Tensor, blocks: Any = None) -> tuple[Tensor, Tensor]:
    """CUDA: flex attention, whose kernel keeps the maximum of each query; `blocks` is its mask for this length."""
    from torch.nn.attention.flex_attention import AuxRequest

    y, aux = _compiled_flex()(
        q,
        k,
        v,
        block_mask=blocks if blocks and blocks.seq_lengths[0] == q.shape[2] else _causal_blocks(q.shape[2], q.device),
        enable_gqa=True,
        return_aux=AuxRequest(max_scores=True),
    )
    return y, aux.max_scores.amax((0, 2))


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "bound": attend_with_bound,
    "exact": attend_with_exact,
}


@torch.no_grad()
def largest_logits(q: Tensor, k: Tensor) -> Tensor:
    """[heads]: max over batch and i >= j of q_i k_j / sqrt(width), a block of queries after the other."""
    batch, heads, length, width = q.shape
    # Scores in fp16 would overflow where attention itself, which sums in fp32, does not.
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, grouped = k.to(dtype), q.to(dtype).reshape(batch, k.shape[1], -1, length, width) / math.sqrt(width)
    largest = grouped.new_full((heads,), -math.inf)
    for first in range(0, length, QUERY_BLOCK):
        rows = grouped[:, :, :, first : first + QUERY_BLOCK]
        last = first + rows.shape[3]
        scores = rows @ k[:, :, None, :last].transpose(-1, -2)
        positions = torch.arange(last, device=q.device)
        future = positions > positions[first:, None]
        highest = scores.masked_fill(future, -math.inf).amax((0, 3, 4)).flatten()
        largest = torch.maximum(largest, highest)
    return largest


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def _causal_blocks(length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(sees, None, None, length, length, device=device)
