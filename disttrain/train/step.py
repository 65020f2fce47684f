"""One training step, readable top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.data.loader import IGNORE_LABEL
from disttrain.distributed.collectives import dist_begin_sum_integers
from disttrain.engines import Engine, UpdateResult


@dataclass(frozen=True)
class StepResult:
    """Device tensors that nobody has waited for, and what the ranks agreed on."""

    loss_sum: Tensor
    """This rank's part of the summed cross-entropy, in nats."""
    update: UpdateResult
    valid_tokens: int
    """Predicted tokens of the whole global batch."""
    chunk_squares: int
    """Sum of the squared numbers of tokens behind each gradient in `update.chunks`."""
    stop: bool
    """Some rank was asked to stop; all ranks know it after the same step."""
    saving: bool
    """Some rank still writes its part of a checkpoint; all ranks know it after the same step."""


def train_step(
    engine: Engine,
    microbatches: Sequence[tuple[Tensor, Tensor]],
    *,
    lr_factor: float | Sequence[float],
    device: torch.device,
    stop_wanted: bool = False,
    saving: bool = False,
    measure_noise: bool = False,
    compare_weights: bool = False,
    lap: Callable[[str], None] = lambda part: None,
) -> StepResult:
    """One optimizer step on this rank's `microbatches`, one or more, of (tokens, labels) [rows, length], CPU tensors.

    The loss is the sum over all tokens of the global batch over their number, whatever the ranks' shares are.
    A batch without any valid token has zero gradients. `lap` is told which part of the step has just ended.
    """
    tokens_of_each = [int((labels != IGNORE_LABEL).sum()) for _, labels in microbatches]
    chunks = engine.begin_step(measure_noise, tokens_of_each, compare_weights)
    lap("data")
    sums = dist_begin_sum_integers(
        sum(tokens_of_each), int(stop_wanted), int(saving), sum(chunk**2 for chunk in chunks)
    )
    lap("communication")

    loss_sum = torch.zeros((), device=device)
    for index, (tokens, labels) in enumerate(microbatches):
        last = index == len(microbatches) - 1
        loss = engine.forward(tokens.to(device), labels.to(device), last)
        lap("forward")
        valid_tokens, stops, savers, chunk_squares = sums()  # has travelled beside the first forward
        lap("communication")
        engine.backward(loss / max(valid_tokens, 1))
        loss_sum = loss_sum + loss.detach()
        lap("backward")

    update = engine.finish_step(lr_factor, loss_sum / max(valid_tokens, 1))
    lap("optimizer")
    return StepResult(loss_sum, update, valid_tokens, chunk_squares, stop=stops > 0, saving=savers > 0)
