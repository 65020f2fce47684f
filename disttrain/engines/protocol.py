"""What a training step needs of an engine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Engine(Protocol):
    """Owns the parallel model and the optimizer; the order of calls in a step is that of `train.step.train_step`."""

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        """The summed cross-entropy of one microbatch; `last` says that the step's last microbatch has come."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def finish_step(self, lr_factor: float) -> Tensor:
        """Clip, step, and drop the gradients; the global gradient norm before clipping."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold of model and optimizer, by name."""
        ...
