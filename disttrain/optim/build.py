"""Optimizers from config: torch's fused AdamW is right and fast on shards, so it is wrapped, not rewritten."""

from __future__ import annotations

import torch
from torch import nn

from disttrain.config import OptimConfig
from disttrain.models import ShardingPlan
from disttrain.optim.param_groups import decay_groups


def build_optimizer(model: nn.Module, config: OptimConfig, plan: ShardingPlan) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` (not wrapped in DDP), with all its state from the start."""
    groups = decay_groups(model.named_parameters(), plan.no_decay, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr
        for parameter in group["params"]:
            optimizer.state[parameter] = _initial_state(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate is its initial one times `factor`: computed from the position, never carried over."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _initial_state(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What AdamW makes lazily in its first step; a resumed run needs it before, equal on every rank."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
