"""The engine that is ours: DDP or FSDP2 with our own clipping and loss scaling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disttrain.checkpoint.state import training_state
from disttrain.config.parallel import ParallelConfig
from disttrain.engines.protocol import UpdateResult
from disttrain.optim import LossScale, clip_scale, dist_grad_norm, scale_gradients, set_learning_rate
from disttrain.parallel import SyncRules, parameters_will_change, set_gradient_sync


class NativeEngine:
    """`model` is what `parallelize` made of `module`; `clip_norm` 0 leaves the gradients as long as they are."""

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        parallel: ParallelConfig,
        device: torch.device,
    ) -> None:
        self.module = module
        self.model = model
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.rules = SyncRules.of(parallel)
        self.loss_scale = LossScale(parallel.param_dtype == "fp16", device)

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        set_gradient_sync(self.model, last, self.rules)
        return self.model(tokens, labels)

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale.scale).backward()

    def finish_step(self, lr_factor: float) -> UpdateResult:
        parameters = list(self.module.parameters())
        unscale = 1.0 / self.loss_scale.scale
        grad_norm = dist_grad_norm(parameters) * unscale
        overflow = self.loss_scale.overflow(grad_norm)
        if self.clip_norm:
            unscale = unscale * clip_scale(grad_norm, self.clip_norm)
        if self.clip_norm or self.loss_scale.enabled:
            scale_gradients(parameters, unscale)
        set_learning_rate(self.optimizer, lr_factor)
        # Fused optimizers leave parameters, moments and step counts alone where this is 1, without a wait.
        self.optimizer.found_inf = overflow if self.loss_scale.enabled else None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(overflow)
        return UpdateResult(grad_norm, overflow, self.loss_scale.scale)

    def state(self) -> dict[str, Tensor]:
        parameters_will_change(self.model)
        return {**training_state(self.module, self.optimizer), **self.loss_scale.state()}

    def loaded(self) -> None:
        self.loss_scale.loaded()
