"""Training on one process with the whole batch at once: what every layout must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.config import ModelConfig, OptimConfig
from disttrain.config.groups import Group
from disttrain.testing.reference.clipping import ReferenceClipper, limited_update, reference_qk_clip
from disttrain.testing.reference.gpt import reference_logits
from disttrain.testing.reference.optimizers import ReferenceOptimizer


@dataclass(frozen=True)
class ReferenceStep:
    loss: Tensor
    gradients: dict[str, Tensor]
    """Before clipping."""
    grad_norm: Tensor
    scores: list[Tensor]
    """[heads, batch, length, length] masked attention scores of each layer."""


def reference_training(
    config: ModelConfig,
    groups: Sequence[tuple[Group, Sequence[str]]],
    weights: dict[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    optim: OptimConfig | None = None,
) -> tuple[list[ReferenceStep], dict[str, Tensor]]:
    """Mean loss over all valid tokens, clipping by group, an update: one step per (tokens, labels) batch; then the
    limit on updates and QK-Clip, where `optim` says so.

    Groups come with the names of their parameters. Returns what each step saw and the final training weights;
    constant learning rate.
    """
    optimizer, clipper, steps = ReferenceOptimizer(groups, weights), ReferenceClipper(groups, len(batches)), []
    for tokens, labels in batches:
        before = dict(optimizer.weights)
        steps.append(_gradients(config, before, tokens, labels))
        optimizer.step(clipper.clip(steps[-1].gradients, before))
        if optim and optim.max_update_ratio:
            optimizer.weights = limited_update(before, optimizer.weights, optim.max_update_ratio)
        if optim and optim.resolved_qk_clip.mode == "clip":
            optimizer.weights = reference_qk_clip(config, optim.qk_clip, optimizer.weights, steps[-1].scores)
    return steps, optimizer.weights


def _gradients(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> ReferenceStep:
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    scores: list[Tensor] = []
    log_probabilities = torch.log_softmax(reference_logits(config, leaves, tokens, scores), dim=-1)
    valid = labels >= 0
    picked = log_probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    loss = -picked[valid].sum() / valid.sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    return ReferenceStep(loss.detach(), gradients, norm, scores)
