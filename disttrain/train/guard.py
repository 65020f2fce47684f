"""Stops a run whose gradients are not finite, before anything is saved after it."""

from __future__ import annotations

import torch

from disttrain.engines import UpdateResult
from disttrain.errors import NumericalError

_SHOWN = 5


class NumericalGuard:
    """Reads each step's verdict where that costs nothing: at once on a CPU, else when the next step is under way."""

    def __init__(self, parameter_names: list[str], scaled: bool) -> None:
        self.names = parameter_names
        self.scaled = scaled
        """Under fp16 a skipped step is how the loss scale finds its place."""
        self._pending: tuple[int, UpdateResult] | None = None

    def look(self, step: int, update: UpdateResult) -> None:
        """Raises NumericalError, on every rank alike, for this step or the one before."""
        self.settle()
        self._pending = None if self.scaled else (step, update)
        if update.skipped.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Wait for the last step's verdict."""
        pending, self._pending = self._pending, None
        if pending is None or not bool(pending[1].skipped):
            return
        step, update = pending
        finite = torch.isfinite(update.norms.parameters).tolist()
        bad = [name for name, fine in zip(self.names, finite, strict=True) if not fine]
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise NumericalError(
            f"step {step}: the gradient of {', '.join(bad[:_SHOWN])}{more}, summed over all ranks, is not finite; no "
            "weight was changed by it. Starting again resumes from the newest checkpoint and comes to the same numbers "
            "unless something changes: try a lower optim.lr, a longer schedule.warmup_steps, or look at the data"
        )
