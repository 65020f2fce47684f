"""Training on one process with the whole batch at once: what every layout must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.config import ModelConfig
from disttrain.config.groups import Group
from disttrain.testing.reference.gpt import reference_logits
from disttrain.testing.reference.optimizers import ReferenceOptimizer, reference_clip


@dataclass(frozen=True)
class ReferenceStep:
    loss: Tensor
    gradients: dict[str, Tensor]
    """Before clipping."""
    grad_norm: Tensor


def reference_training(
    config: ModelConfig,
    groups: Sequence[tuple[Group, Sequence[str]]],
    weights: dict[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
) -> tuple[list[ReferenceStep], dict[str, Tensor]]:
    """Mean loss over all valid tokens, clipping by group, an update: one step per (tokens, labels) batch.

    Groups come with the names of their parameters. Returns what each step saw and the final training weights;
    constant learning rate.
    """
    optimizer, steps = ReferenceOptimizer(groups, weights), []
    for tokens, labels in batches:
        steps.append(_gradients(config, optimizer.weights, tokens, labels))
        optimizer.step(reference_clip(groups, steps[-1].gradients))
    return steps, optimizer.weights


def _gradients(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> ReferenceStep:
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    log_probabilities = torch.log_softmax(reference_logits(config, leaves, tokens), dim=-1)
    valid = labels >= 0
    picked = log_probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    loss = -picked[valid].sum() / valid.sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    return ReferenceStep(loss.detach(), gradients, norm)
