"""Optimizer classes as somebody else might write them."""

from __future__ import annotations

from typing import Any

import torch


class Signum(torch.optim.Optimizer):
    """Element-wise, with a python number in its state and no weight decay."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state.setdefault("count", 0)
                state.setdefault("start", p.detach().clone())  # what it begins as is not zero
                state.setdefault("average", torch.zeros_like(p))
                state["count"] += 1
                state["average"].mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                p.add_(state["average"].sign(), alpha=-group["lr"] / state["count"])
                p.lerp_(state["start"], 0.01)


class Normalised(Signum):
    """Divides by the norm of a tensor, which a shard does not know."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.add_(p.grad / (p.grad.norm() + 1e-9), alpha=-group["lr"])


class Remembering(Signum):
    """Keeps a list in its state."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [1, 2]


class NeedsClosure(Signum):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


def not_a_class() -> None: ...
