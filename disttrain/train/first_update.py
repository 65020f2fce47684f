"""The first update of a process must move every parameter that it trains."""

from __future__ import annotations

from disttrain.engines import UpdateResult
from disttrain.optim import OptimizerSet
from disttrain.optim.movement import MovementCheck
from disttrain.train.output import RunOutput

_SHOWN = 8


class FirstUpdate:
    """`before` and `after` go around every step and do nothing once the first has been looked at. Collective."""

    def __init__(self, optimizer: OptimizerSet, output: RunOutput) -> None:
        self.optimizer, self.output = optimizer, output
        self._check: MovementCheck | None = None
        self._left = 1 + optimizer.looking_steps

    def before(self) -> None:
        if self._left == 1:
            self._check = MovementCheck(self.optimizer.named_parameters)

    def after(self, update: UpdateResult) -> None:
        """A step that was skipped (fp16 looks for its loss scale) shows nothing: the next one is looked at."""
        if not self._left or bool(update.skipped):
            return
        self._left -= 1
        if self._check is None:
            return
        unmoved, self._check = self._check.dist_unmoved(), None
        if not unmoved:
            return
        norms = dict(zip(self.optimizer.parameter_names, update.norms.parameters.tolist(), strict=True))
        without = [name for name in unmoved if norms[name] == 0]
        cause = (
            "their gradients are zero: the loss does not depend on them"
            if len(without) == len(unmoved)
            else (
                "a rate of 0, or a step below the spacing of their numbers; gradients are zero for "
                + (", ".join(without[:_SHOWN]) or "none of them")
            )
        )
        more = f" and {len(unmoved) - _SHOWN} more" if len(unmoved) > _SHOWN else ""
        self.output.warn(f"the first update did not move {', '.join(unmoved[:_SHOWN])}{more}: {cause}")
