"""Our element-wise optimizers: what torch lacks, on local shards, with their state from the start.

torch's `_foreach_` functions on plain tensors cost one call for a group where DTensors cost a dispatch for each tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from disttrain.optim.functional import (
    ademamix_alpha,
    ademamix_beta3,
    ademamix_update,
    lion_update,
    schedule_free_average,
    schedule_free_update,
)
from disttrain.optim.sharding import local

Settings = dict[str, Any]
"""One of torch's parameter groups: `params`, the current `lr`, and the section that it came from as `config`."""


class ElementwiseOptimizer(torch.optim.Optimizer, ABC):
    """Parameters with equal histories are updated together; no communication, and no wait for the device."""

    moments: ClassVar[tuple[str, ...]]
    """State tensors like the parameter, zero at the start."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """State kept as fp64 scalars on the host, zero at the start; `step` counts from 1 in an update."""

    def __init__(self, groups: list[Settings]) -> None:
        super().__init__(groups, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._initial_state(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[float, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    history = tuple(float(self.state[parameter][key]) for key in self.scalars)
                    alike.setdefault(history, []).append(parameter)
            for history, parameters in alike.items():
                self._update_alike(group, dict(zip(self.scalars, history, strict=True)), parameters)

    def _update_alike(self, group: Settings, scalars: dict[str, float], parameters: list[nn.Parameter]) -> None:
        if "step" in scalars:
            scalars["step"] += 1
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        moments = [[local(self.state[p][key]) for p in parameters] for key in self.moments]
        self._update(group, scalars, [local(p) for p in parameters], gradients, *moments)
        for key, value in scalars.items():
            for parameter in parameters:
                self.state[parameter][key].fill_(value)

    def _initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in self.moments}
        return moments | {key: torch.zeros((), dtype=torch.float64) for key in self.scalars}

    @abstractmethod
    def _update(self, group: Settings, scalars: dict[str, float], *lists: list[Tensor]) -> None:
        """Write the step into `scalars` and `lists`: weights, gradients, and moments in the order of `self.moments`."""


class Lion(ElementwiseOptimizer):
    moments = ("exp_avg",)

    def _update(self, group: Settings, scalars: dict[str, float], *lists: list[Tensor]) -> None:
        config = group["config"]
        lion_update(*lists, lr=group["lr"], betas=config.betas, weight_decay=config.weight_decay)


class AdEMAMix(ElementwiseOptimizer):
    moments = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
    scalars = ("step",)

    def _update(self, group: Settings, scalars: dict[str, float], *lists: list[Tensor]) -> None:
        config, step = group["config"], int(scalars["step"])
        beta1, beta2, beta3 = config.betas
        ademamix_update(
            *lists,
            step=step,
            lr=group["lr"],
            betas=(beta1, beta2, ademamix_beta3(step, beta1, beta3, config.beta3_warmup_steps)),
            alpha=ademamix_alpha(step, config.alpha, config.alpha_warmup_steps),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )


class ScheduleFreeAdamW(ElementwiseOptimizer):
    """The parameters hold y; `average` is the point x that the model is evaluated and exported at."""

    moments = ("z", "exp_avg_sq")
    scalars = ("step", "lr_max", "weight_sum")

    def _initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return super()._initial_state(parameter) | {"z": parameter.detach().clone()}

    def weights_changed(self) -> None:
        """Other weights were loaded without a state: the sequence starts at them."""
        for parameter, state in self.state.items():
            state["z"].copy_(parameter.detach())

    def average(self, parameter: nn.Parameter, beta1: float) -> Tensor:
        return schedule_free_average(parameter.detach(), self.state[parameter]["z"], beta1)

    def _update(self, group: Settings, scalars: dict[str, float], *lists: list[Tensor]) -> None:
        config, lr = group["config"], group["lr"]
        scalars["lr_max"] = max(scalars["lr_max"], lr)
        weight = scalars["step"] ** config.weight_power * scalars["lr_max"] ** 2
        scalars["weight_sum"] += weight
        schedule_free_update(
            *lists,
            step=int(scalars["step"]),
            lr=lr,
            average_weight=weight / scalars["weight_sum"] if weight else 0.0,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
