"""What a training step needs of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class UpdateResult:
    """Device scalars of one update, equal on all ranks."""

    grad_norm: Tensor
    """Of all gradients together, before clipping, without the loss scale."""
    skipped: Tensor
    """1 when the update was left out because a gradient was not finite under fp16, else 0."""
    loss_scale: Tensor
    """What the next step's loss is multiplied by before the backward; 1 without fp16."""


class Engine(Protocol):
    """Owns the parallel model and the optimizer; the order of calls in a step is that of `train.step.train_step`."""

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        """The summed cross-entropy of one microbatch; `last` says that the step's last microbatch has come."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def finish_step(self, lr_factor: float) -> UpdateResult:
        """Clip, update, and drop the gradients."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by name; a load writes into these tensors."""
        ...

    def loaded(self) -> None:
        """Call after a load has written into `state()`."""
        ...
