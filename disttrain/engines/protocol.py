"""What a training step needs of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from disttrain.optim import AttentionLogits, GradientNorms


@dataclass(frozen=True)
class UpdateResult:
    """Device tensors of one update, equal on all ranks."""

    norms: GradientNorms
    """Before clipping, without the loss scale; and how much was clipped."""
    skipped: Tensor
    """1 when the update was left out, else 0."""
    verdict: Tensor
    """Why it was left out: a `Verdict` as an integer."""
    loss_scale: Tensor
    """What the next step's loss is multiplied by before the backward; 1 without fp16."""
    chunks: Tensor | None = None
    """Sum over all ranks of the squared norms of their own gradients, where they were measured."""
    update_ratios: Tensor | None = None
    """[parameters] how far each would have moved relative to its norm, where updates are limited."""
    logits: AttentionLogits | None = None
    """Where attention is watched."""
    weight_sums: Tensor | None = None
    """[parameters] what `parallel.replicas.weight_sums` made of the weights that this rank computed with; not equal on
    all ranks where weights are cut, or memory is broken."""

    @property
    def grad_norm(self) -> Tensor:
        return self.norms.total


class Engine(Protocol):
    """Owns the parallel model and the optimizer; the order of calls in a step is that of `train.step.train_step`."""

    def begin_step(self, measure_noise: bool, tokens: Sequence[int], compare_weights: bool = False) -> list[int]:
        """Before the first forward of microbatches with so many valid `tokens`; those of each gradient that is seen by
        itself in a step whose noise is measured, none otherwise. `compare_weights` asks for `weight_sums`."""
        ...

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        """The summed cross-entropy of one microbatch; `last` says that the step's last microbatch has come."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def finish_step(self, lr_factor: float | Sequence[float], loss: Tensor | None = None) -> UpdateResult:
        """Clip, update at `lr_factor` times the rates (one for all groups, or one each), and drop the gradients.

        `loss` is this rank's share of the mean loss, a scalar, for the judge. With a gradient that is not finite, or
        where the judge finds the step bad, nothing is updated.
        """
        ...

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """The model as it is to be used, where an algorithm trains at other weights; no training inside."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by name; a load writes into these tensors."""
        ...

    def loaded(self) -> None:
        """Call after a load has written into `state()`."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The weights that are trained, by the names of `state`; a load writes into these tensors."""
        ...

    def weights_changed(self) -> None:
        """Call after a load has written into `weights()`, with nothing for the optimizer."""
        ...
