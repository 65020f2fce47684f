"""Validation loss and bits per byte, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from disttrain.data.loader import IGNORE_LABEL, Microbatch
from disttrain.parallel import parameters_will_change


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Nats per predicted token."""
    bits_per_byte: float | None
    """None where the bytes behind the tokens are not known (token files without a tokenizer)."""
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Microbatch], bytes_per_token: np.ndarray | None, device: torch.device
) -> Evaluation:
    """Evaluate `model` on this rank's `batches`; a collective where there is a process group, with equal batch counts.

    Leaves FSDP2 ready for parameters to be written (a forward may leave gathered weights behind).
    """
    nats, tokens, text_bytes = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    for batch in batches:
        inputs, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
        nats += model(inputs.to(device), labels.to(device)).double()
        valid = batch.labels[batch.labels != IGNORE_LABEL]
        tokens += valid.size
        text_bytes += 0 if bytes_per_token is None else int(bytes_per_token[valid].sum())
    parameters_will_change(model)
    total = torch.tensor([nats.item(), tokens, text_bytes], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    all_nats, all_tokens, all_bytes = total.tolist()
    return Evaluation(
        loss=all_nats / max(all_tokens, 1),
        bits_per_byte=all_nats / math.log(2) / all_bytes if all_bytes else None,
        tokens=int(all_tokens),
    )
