"""The engine that is ours: DDP or FSDP2 with our own clipping and loss scaling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from disttrain.checkpoint.state import model_state, training_state
from disttrain.config.parallel import ParallelConfig
from disttrain.engines.protocol import UpdateResult
from disttrain.optim import GradientClipper, LossScale, OptimizerSet, Safeguards, set_learning_rate
from disttrain.optim.anomaly import Verdict, finite_verdict
from disttrain.parallel import NoiseProbe, SyncRules, drop_gradients, parameters_will_change, set_gradient_sync
from disttrain.parallel.replicas import weight_sums


class NativeEngine:
    """`model` is what `parallelize` made of `module`; `optimizer` owns the parameters of `module`.

    Without `safeguards`, groups are clipped by their rules as far as these need no names.
    """

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        optimizer: OptimizerSet,
        *,
        parallel: ParallelConfig,
        device: torch.device,
        safeguards: Safeguards | None = None,
        probe: NoiseProbe | None = None,
    ) -> None:
        self.module = module
        self.model = model
        self.optimizer = optimizer
        self.probe = probe
        self.safeguards = safeguards or Safeguards(GradientClipper(optimizer.param_groups))
        self.rules = SyncRules.of(parallel)
        self._parameters = list(module.parameters())
        self.loss_scale = LossScale(parallel.param_dtype == "fp16", device)
        self._compare_weights = False
        self._weight_sums: Tensor | None = None

    def begin_step(self, measure_noise: bool, tokens: Sequence[int], compare_weights: bool = False) -> list[int]:
        self._compare_weights, self._weight_sums = compare_weights, None
        return self.probe.begin(measure_noise, tokens) if self.probe else []

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        # One rank's microbatches are told apart by their reduced gradients.
        each = self.probe is not None and self.probe.measuring and self.probe.alone
        set_gradient_sync(self.model, last, replace(self.rules, reduce_each=True) if each else self.rules)
        loss = self.model(tokens, labels)
        if self._compare_weights and last:
            self._weight_sums = weight_sums(self.module.parameters())
        return loss

    def backward(self, loss: Tensor) -> None:
        self._backward(loss * self.loss_scale.scale)
        if self.probe is not None:
            self.probe.after_backward(self._parameters)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish_step(self, lr_factor: float | Sequence[float], loss: Tensor | None = None) -> UpdateResult:
        return self._update(lr_factor, loss)

    def _update(self, lr_factor: float | Sequence[float], loss: Tensor | None) -> UpdateResult:
        guards, scale = self.safeguards, self.loss_scale.scale
        verdicts: list[Tensor] = []

        def accepts(norm: Tensor, sums: Tensor) -> Tensor:
            verdicts.append(guards.judge.judge(sums[0], norm) if guards.judge else finite_verdict(norm))
            return verdicts[0] == Verdict.GOOD

        measuring = self.probe is not None and self.probe.measuring
        chunks = self.probe.squares(scale) if self.probe and measuring else torch.zeros_like(scale)
        share = torch.zeros_like(scale) if loss is None else loss.to(scale.device)
        norms = guards.clipper.dist_clip(1.0 / scale, torch.stack([share.double(), chunks.double()]), accepts)
        skipped = (verdicts[0] != Verdict.GOOD).float()
        set_learning_rate(self.optimizer, lr_factor)
        if guards.update_limit:
            guards.update_limit.remember()
        self.optimizer.step(skip=skipped)
        ratios = guards.update_limit.dist_apply() if guards.update_limit else None
        logits = guards.qk_clip.dist_apply(skipped) if guards.qk_clip else None
        drop_gradients(self.model, (p for group in self.optimizer.param_groups for p in group["params"]))
        summed = norms.extras[1] / scale.double().square() if norms.extras is not None and measuring else None
        # A spike is none of the loss scale's business.
        self.loss_scale.update((verdicts[0] == Verdict.GRADIENT_NOT_FINITE).float())
        return UpdateResult(
            norms, skipped, verdicts[0], self.loss_scale.scale, summed, ratios, logits, self._weight_sums
        )

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        parameters_will_change(self.model)
        with self.optimizer.evaluation_weights():
            yield
            parameters_will_change(self.model)

    def state(self) -> dict[str, Tensor]:
        parameters_will_change(self.model)
        return {
            **training_state(self.module, self.optimizer),
            **self.loss_scale.state(),
            **self.safeguards.clipper.state(),
            **(self.safeguards.judge.state() if self.safeguards.judge else {}),
        }

    def weights(self) -> dict[str, Tensor]:
        parameters_will_change(self.model)
        return model_state(self.module)

    def loaded(self) -> None:
        self.optimizer.loaded()
        self.loss_scale.loaded()

    def weights_changed(self) -> None:
        self.optimizer.weights_changed()
