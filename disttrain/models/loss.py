"""The loss as a sum: only the caller knows how many tokens the whole global batch holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of `logits` [..., vocab] at `labels` [...], in nats, in fp32 or better.

    Labels of -100, torch's default `ignore_index`, are not predicted. A batch without a valid label gives zero with
    zero gradients, so that a rank without data stays in step.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def chunked_cross_entropy_sum(head: nn.Linear, x: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """`cross_entropy_sum(head(x), labels)` without ever holding more than `chunk_tokens` rows of logits.

    `x` [..., d_model]; logits are computed again in the backward. Sums come in another order than at once.
    """
    chunks = zip(x.flatten(0, -2).split(chunk_tokens), labels.flatten().split(chunk_tokens), strict=True)
    sums = [checkpoint(_head_loss, head, part, wanted, use_reentrant=False) for part, wanted in chunks]
    return torch.stack(sums).sum()


def _head_loss(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_sum(head(x), labels)
