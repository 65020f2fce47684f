"""Every trainable parameter in exactly one group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from disttrain.models.sharding_plan import matches


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], no_decay: tuple[str, ...], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups for `torch.optim`: `decay` and `no_decay`, the latter for names that match one of the patterns.

    An empty group is left out.
    """
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (rest if matches(name, no_decay) else decay).append(parameter)
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
