"""The engine that is ours: DDP or FSDP2 with our own clipping and loss scaling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from disttrain.checkpoint.state import training_state
from disttrain.config.parallel import ParallelConfig
from disttrain.engines.protocol import UpdateResult
from disttrain.optim import LossScale, OptimizerSet, dist_clip_gradients, set_learning_rate
from disttrain.parallel import SyncRules, parameters_will_change, set_gradient_sync


class NativeEngine:
    """`model` is what `parallelize` made of `module`; `optimizer` owns the parameters of `module`."""

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        optimizer: OptimizerSet,
        *,
        parallel: ParallelConfig,
        device: torch.device,
    ) -> None:
        self.module = module
        self.model = model
        self.optimizer = optimizer
        self.rules = SyncRules.of(parallel)
        self.loss_scale = LossScale(parallel.param_dtype == "fp16", device)

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        set_gradient_sync(self.model, last, self.rules)
        return self.model(tokens, labels)

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale.scale).backward()

    def finish_step(self, lr_factor: float) -> UpdateResult:
        norms = dist_clip_gradients(self.optimizer.param_groups, 1.0 / self.loss_scale.scale)
        skipped = (~torch.isfinite(norms.total)).float()
        set_learning_rate(self.optimizer, lr_factor)
        self.optimizer.step(skip=skipped)
        self.optimizer.zero_grad()
        self.loss_scale.update(skipped)
        return UpdateResult(norms, skipped, self.loss_scale.scale)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        parameters_will_change(self.model)
        with self.optimizer.evaluation_weights():
            yield
            parameters_will_change(self.model)

    def state(self) -> dict[str, Tensor]:
        parameters_will_change(self.model)
        return {**training_state(self.module, self.optimizer), **self.loss_scale.state()}

    def loaded(self) -> None:
        self.optimizer.loaded()
        self.loss_scale.loaded()

    def weights_changed(self) -> None:
        self.optimizer.weights_changed()
