"""The engine that is ours: DDP or FSDP2 with our own clipping."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disttrain.checkpoint.state import training_state
from disttrain.optim import clip_scale, dist_grad_norm, scale_gradients, set_learning_rate
from disttrain.parallel import set_gradient_sync


class NativeEngine:
    """`model` as `parallelize` returned it; `clip_norm` 0 leaves the gradients as they are."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, clip_norm: float, grad_accumulation: str
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.grad_accumulation = grad_accumulation

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        set_gradient_sync(self.model, last, self.grad_accumulation)
        return self.model(tokens, labels)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish_step(self, lr_factor: float) -> Tensor:
        parameters = list(self.model.parameters())
        grad_norm = dist_grad_norm(parameters)
        if self.clip_norm:
            scale_gradients(parameters, clip_scale(grad_norm, self.clip_norm))
        set_learning_rate(self.optimizer, lr_factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def state(self) -> dict[str, Tensor]:
        return training_state(self.model, self.optimizer)
