"""Training on one process with the whole batch at once: what every layout must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.config import ModelConfig, OptimConfig
from disttrain.testing.reference.gpt import reference_logits


@dataclass(frozen=True)
class ReferenceStep:
    loss: Tensor
    gradients: dict[str, Tensor]
    """Before clipping."""
    grad_norm: Tensor


def reference_training(
    config: ModelConfig,
    optim: OptimConfig,
    weights: dict[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    no_decay: set[str],
) -> tuple[list[ReferenceStep], dict[str, Tensor]]:
    """Mean loss over all valid tokens, clipping by the global norm, AdamW: one step per (tokens, labels) batch.

    Returns what each step saw and the final weights; constant learning rate.
    """
    weights = {name: weight.clone() for name, weight in weights.items()}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    beta1, beta2 = optim.betas
    steps = []
    for t, (tokens, labels) in enumerate(batches, 1):
        step = _gradients(config, weights, tokens, labels)
        steps.append(step)
        scale = min(1.0, optim.clip_norm / (step.grad_norm.item() + 1e-6)) if optim.clip_norm else 1.0
        for name, weight in weights.items():
            gradient = step.gradients[name] * scale
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            direction = first[name] / (1 - beta1**t) / ((second[name] / (1 - beta2**t)).sqrt() + optim.eps)
            decay = 0.0 if name in no_decay else optim.weight_decay
            weights[name] = weight - optim.lr * (direction + decay * weight)
    return steps, weights


def _gradients(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> ReferenceStep:
    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    log_probabilities = torch.log_softmax(reference_logits(config, leaves, tokens), dim=-1)
    valid = labels >= 0
    picked = log_probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    loss = -picked[valid].sum() / valid.sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for weight in weights.values():
        weight.requires_grad_(False)
    return ReferenceStep(
        loss.detach(), gradients, torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    )
