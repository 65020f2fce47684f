"""Algorithms that need a matrix whole, on whole matrices, straight from their formulas."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from disttrain.optim.newton_schulz import polynomials_of
from disttrain.optim.soap import soap_state, soap_update

Memory = dict[str, Any]


def matrix_step(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    """The weight after step `t`; matrices that one parameter holds are taken one by one."""
    dim, sizes = _split(group, memory["name"], weight)
    pieces = zip(weight.split(sizes, dim), gradient.split(sizes, dim), strict=True)
    stepped = [_one(group, memory.setdefault(str(n), {}), w, g, lr, t) for n, (w, g) in enumerate(pieces)]
    return torch.cat(stepped, dim)


def _one(group: Any, memory: Memory, weight: Tensor, gradient: Tensor, lr: float, t: int) -> Tensor:
    momentum = memory["m"] = group.momentum * memory.get("m", 0.0) + (1 - group.momentum) * gradient
    if group.nesterov:
        momentum = group.momentum * momentum + (1 - group.momentum) * gradient
    direction = _DIRECTIONS.get(group.algorithm, _custom)(group, memory, momentum, t)
    rows, columns = weight.shape
    scale = {
        "original": math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "spectral": math.sqrt(rows / columns),
        "none": 1.0,
    }[group.lr_scale]
    return weight - lr * (scale * direction + group.weight_decay * weight)


def _split(group: Any, name: str, weight: Tensor) -> tuple[int, list[int]]:
    for split in group.split:
        if re.search(split.match, name):
            size = weight.shape[split.dim]
            return split.dim, list(
                split.sizes if isinstance(split.sizes, tuple) else [split.sizes] * (size // split.sizes)
            )
    return 0, [weight.shape[0]]


def _muon(group: Any, memory: Memory, momentum: Tensor, t: int) -> Tensor:
    """The polynomials on singular values, by the matrix products that define them; always of X X^T."""
    polynomials = polynomials_of(group.coefficients)
    x = momentum / (polynomials.safety * momentum.square().sum().sqrt() + polynomials.eps)
    for a, b, c in polynomials.steps:
        square = x @ x.T @ x if x.shape[0] <= x.shape[1] else x @ (x.T @ x)
        fourth = x @ x.T @ square if x.shape[0] <= x.shape[1] else square @ (x.T @ x)
        x = a * x + b * square + c * fourth
    return x


def _normuon(group: Any, memory: Memory, momentum: Tensor, t: int) -> Tensor:
    direction = _muon(group, memory, momentum, t)
    memory["v"] = group.beta2 * memory.get("v", 0.0) + (1 - group.beta2) * direction.square().mean(1)
    levelled = direction / (memory["v"].sqrt() + group.row_eps)[:, None]
    before, after = (x.square().sum().sqrt() for x in (direction, levelled))
    return levelled * (before / after) if after > 0 else levelled


def _soap(group: Any, memory: Memory, gradient: Tensor, t: int) -> Tensor:
    """The very function: an eigenbasis is known only up to signs, and of a singular matrix not even that, so another
    sequence of operations would be another trajectory. tests/optim/test_soap.py tests the function itself."""
    state = memory.setdefault("state", soap_state(gradient, max_dim=group.max_dim))
    settings = {"betas": group.betas, "eps": group.eps, "every": group.every}
    return soap_update(gradient, state | {"step": torch.tensor(float(t))}, **settings)


def _shampoo(group: Any, memory: Memory, gradient: Tensor, t: int) -> Tensor:
    beta1, beta2 = group.betas
    for key, beta, value in (
        ("m", beta1, gradient),
        ("v", beta2, gradient**2),
        ("left", beta2, gradient @ gradient.T),
        ("right", beta2, gradient.T @ gradient),
    ):
        memory["shampoo " + key] = beta * memory.get("shampoo " + key, 0.0) + (1 - beta) * value
    mean = memory["shampoo m"] / (1 - beta1**t)
    if (t - 1) % group.every == 0:
        memory["roots"] = [
            _inverse_fourth_root(memory[f"shampoo {side}"] / (1 - beta2**t), group.ridge) for side in ("left", "right")
        ]
    left, right = memory["roots"]
    direction = left @ mean @ right
    adam = mean / ((memory["shampoo v"] / (1 - beta2**t)).sqrt() + group.eps)
    length = direction.square().sum().sqrt()
    return direction * (adam.square().sum().sqrt() / length) if length > 0 else direction


def _inverse_fourth_root(gram: Tensor, ridge: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    if values[-1] <= 0:
        return torch.eye(len(gram), dtype=gram.dtype)
    return vectors @ torch.diag((values + ridge * values[-1]) ** -0.25) @ vectors.T


def _custom(group: Any, memory: Memory, gradient: Tensor, t: int) -> Tensor:
    path, _, name = group.algorithm.partition(":")
    found = getattr(importlib.import_module(path), name)
    update: Any = found() if inspect.isclass(found) else found
    if "state" not in memory:
        memory["state"] = update.initial_state(gradient * 0) if hasattr(update, "initial_state") else {}
    seen = {**memory["state"], "step": torch.tensor(float(t))}
    direction = update(gradient.clone(), seen, **group.arguments)
    memory["state"] = {key: value for key, value in seen.items() if key != "step"}
    return direction


_DIRECTIONS: dict[str, Callable[[Any, Memory, Tensor, int], Tensor]] = {
    "muon": _muon,
    "normuon": _normuon,
    "soap": _soap,
    "shampoo": _shampoo,
}
