"""The loss as a sum: only the caller knows how many tokens the whole global batch holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of `logits` [..., vocab] at `labels` [...], in nats, in fp32 or better.

    Labels of -100, torch's default `ignore_index`, are not predicted. A batch without a valid label gives zero with
    zero gradients, so that a rank without data stays in step.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
