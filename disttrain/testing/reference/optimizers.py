"""Every algorithm on whole tensors, one after the other, straight from its formula: what any layout must reproduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.config.groups import Custom, Group
from disttrain.config.matrix_groups import MatrixGroup
from disttrain.testing.reference.matrices import matrix_step

Gradients = Mapping[str, Tensor]
Memory = dict[str, Any]
"""What one parameter's algorithm remembers; begins with the parameter's name."""


class ReferenceOptimizer:
    """`groups` are sections with the names that they own; `weights` are the training weights, whole tensors."""

    def __init__(self, groups: Sequence[tuple[Group, Sequence[str]]], weights: Mapping[str, Tensor]) -> None:
        self.owner = {name: group for group, names in groups for name in names}
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}
        self.memory: dict[str, Memory] = {name: {"name": name} for name in weights}
        self.t = 0

    def step(self, gradients: Gradients, lr_factor: float = 1.0) -> None:
        self.t += 1
        for name, gradient in gradients.items():
            group = self.owner[name]
            update = matrix_step if isinstance(group, MatrixGroup) else _UPDATES.get(group.algorithm, _foreign)
            lr = group.lr * lr_factor
            self.weights[name] = update(group, self.memory[name], self.weights[name], gradient, lr, self.t)

    def evaluation_weights(self) -> dict[str, Tensor]:
        """The average x of a schedule-free algorithm, else the weights."""
        return {name: self.memory[name].get("x", weight) for name, weight in self.weights.items()}


def _sgd(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    return weight - lr * (gradient + group.weight_decay * weight)


def _momentum(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    gradient = gradient + group.weight_decay * weight
    memory["m"] = group.momentum * memory.get("m", 0.0) + gradient
    nesterov = group.algorithm == "nesterov"
    return weight - lr * (gradient + group.momentum * memory["m"] if nesterov else memory["m"])


def _rmsprop(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    gradient = gradient + group.weight_decay * weight
    memory["v"] = group.alpha * memory.get("v", 0.0) + (1 - group.alpha) * gradient**2
    return weight - lr * gradient / (memory["v"].sqrt() + group.eps)


def _adam_direction(betas: Any, eps: float, memory: Memory, gradient: Tensor, t: int) -> Tensor:
    beta1, beta2 = betas
    memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * gradient
    memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * gradient**2
    return memory["m"] / (1 - beta1**t) / ((memory["v"] / (1 - beta2**t)).sqrt() + eps)


def _adam(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    return weight - lr * _adam_direction(group.betas, group.eps, memory, gradient + group.weight_decay * weight, t)


def _adamw(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    return weight - lr * (_adam_direction(group.betas, group.eps, memory, gradient, t) + group.weight_decay * weight)


def _lion(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    beta1, beta2 = group.betas
    held = memory.get("m", torch.zeros_like(gradient))
    memory["m"] = beta2 * held + (1 - beta2) * gradient
    return weight - lr * ((beta1 * held + (1 - beta1) * gradient).sign() + group.weight_decay * weight)


def _ademamix(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    beta1, beta2, beta3 = group.betas
    alpha = group.alpha
    if t < group.alpha_warmup_steps:
        alpha *= t / group.alpha_warmup_steps
    if t < group.beta3_warmup_steps:
        first, last = (math.log(0.5) / math.log(beta) - 1 for beta in (beta1, beta3))
        steps = first + (last - first) * t / group.beta3_warmup_steps
        beta3 = 0.5 ** (1 / (steps + 1))
    memory["fast"] = beta1 * memory.get("fast", 0.0) + (1 - beta1) * gradient
    memory["slow"] = beta3 * memory.get("slow", 0.0) + (1 - beta3) * gradient
    memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * gradient**2
    momentum = memory["fast"] / (1 - beta1**t) + alpha * memory["slow"]
    direction = momentum / ((memory["v"] / (1 - beta2**t)).sqrt() + group.eps)
    return weight - lr * (direction + group.weight_decay * weight)


def _adafactor(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    beta2 = 1 - t**group.beta2_decay
    squares = gradient**2 + group.eps1
    if weight.dim() == 2:
        memory["r"] = beta2 * memory.get("r", 0.0) + (1 - beta2) * squares.mean(dim=1)
        memory["c"] = beta2 * memory.get("c", 0.0) + (1 - beta2) * squares.mean(dim=0)
        second = torch.outer(memory["r"], memory["c"]) / memory["r"].mean()
    else:
        memory["v"] = second = beta2 * memory.get("v", 0.0) + (1 - beta2) * squares
    update = gradient / second.sqrt()
    update = update / max(1.0, _root_mean_square(update) / group.clip_threshold)
    length = max(group.eps2, _root_mean_square(weight)) * min(lr, 1 / math.sqrt(t))
    return weight - lr * group.weight_decay * weight - length * update


def _root_mean_square(values: Tensor) -> float:
    return math.sqrt((values**2).mean().item())


def _schedule_free(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    beta1, beta2 = group.betas
    x, z = memory.get("x", weight), memory.get("z", weight)
    memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * gradient**2
    direction = gradient / ((memory["v"] / (1 - beta2**t)).sqrt() + group.eps) + group.weight_decay * weight
    memory["largest"] = max(memory.get("largest", 0.0), lr)
    share = t**group.weight_power * memory["largest"] ** 2
    memory["sum"] = memory.get("sum", 0.0) + share
    memory["z"] = z - lr * direction
    memory["x"] = x + share / memory["sum"] * (memory["z"] - x)
    return (1 - beta1) * memory["z"] + beta1 * memory["x"]


def _foreign(group: Custom, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    """The user's own class, on the whole tensor."""
    parameter = memory.setdefault("parameter", nn.Parameter(weight.clone()))
    if "optimizer" not in memory:
        path, _, name = group.algorithm.rpartition(".")
        kind = getattr(import_module(path), name)
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in group.arguments.items()}
        if "weight_decay" in signature(kind).parameters:
            arguments["weight_decay"] = group.weight_decay
        memory["optimizer"] = kind([parameter], lr=lr, **arguments)
    memory["optimizer"].param_groups[0]["lr"] = lr
    parameter.grad = gradient.clone()
    memory["optimizer"].step()
    return parameter.detach().clone()


_UPDATES: dict[str, Callable[[Any, Memory, Tensor, Tensor, float, int], Tensor]] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "nesterov": _momentum,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adamw,
    "lion": _lion,
    "ademamix": _ademamix,
    "adafactor": _adafactor,
    "schedule_free_adamw": _schedule_free,
}
