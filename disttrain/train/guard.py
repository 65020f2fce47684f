"""Finds the steps that the judge has refused, says what was wrong with them, and decides what is to be done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from disttrain.config.resilience import AnomalyConfig
from disttrain.distributed.collectives import dist_all_gather_rows
from disttrain.errors import NumericalError
from disttrain.optim import OptimizerSet
from disttrain.optim.anomaly import Verdict
from disttrain.optim.sharding import local
from disttrain.train.step import StepResult

_SHOWN = 5
_REMEDY = (
    "starting again resumes from the newest checkpoint and comes to the same numbers unless something changes: try a "
    "lower optim.lr, a longer schedule.warmup_steps, or look at the data"
)


@dataclass(frozen=True)
class BadStep:
    step: int
    reason: str
    """What was wrong, where, and which samples the step was made of."""
    hopeless: bool
    """A weight is not finite: leaving out steps helps no more."""


class StepGuard:
    """Reads each step's verdict where that costs nothing: at once on a CPU, else when the next step is under way."""

    def __init__(self, optimizer: OptimizerSet, scaled: bool) -> None:
        self.optimizer, self.names = optimizer, optimizer.parameter_names
        self.scaled = scaled
        """Under fp16 a gradient that is not finite is how the loss scale finds its place."""
        self._pending: tuple[int, tuple[int, int], StepResult] | None = None

    def look(self, step: int, samples: tuple[int, int], result: StepResult) -> list[BadStep | None]:
        """What has become known, oldest first: None for a good step. Collective where a step was bad.

        `samples` are the first and the last of the global batch, by their place in the run's order.
        """
        known = self.settle()
        self._pending = (step, samples, result)
        if result.update.verdict.device.type == "cpu":
            known += self.settle()
        return known

    def forget(self) -> None:
        """The step that was not looked at yet does not stand."""
        self._pending = None

    def settle(self) -> list[BadStep | None]:
        """Wait for the last step's verdict."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        step, samples, result = pending
        verdict = Verdict(int(result.update.verdict))
        if verdict is Verdict.GOOD:
            return [None]
        losses = dist_all_gather_rows(result.loss_sum.detach().double().reshape(1)).flatten().tolist()
        lost = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if self.scaled and verdict is Verdict.GRADIENT_NOT_FINITE and not lost:
            return []
        reason = f"{self._what(verdict, result)}{_whose(lost)}; samples {samples[0]:,} to {samples[1]:,}"
        return [BadStep(step, reason, hopeless=weights_not_finite(self.optimizer) > 0)]

    def _what(self, verdict: Verdict, result: StepResult) -> str:
        norms = result.update.norms
        if verdict is Verdict.LOSS_SPIKE:
            return "the loss is far above the last steps'"
        if verdict is Verdict.GRADIENT_SPIKE:
            largest = self.names[int(norms.parameters.argmax())]
            return f"the gradient norm, {norms.total.item():.3g}, is far above the last steps' (largest: {largest})"
        finite = torch.isfinite(norms.parameters).tolist()
        bad = [name for name, fine in zip(self.names, finite, strict=True) if not fine]
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        if not bad:
            return "the loss is not finite"
        return f"the gradient of {', '.join(bad[:_SHOWN])}{more}, summed over all ranks, is not finite"


def weights_not_finite(optimizer: OptimizerSet) -> int:
    """On how many ranks a weight is not finite. Collective."""
    shards = [local(parameter).detach() for parameter in optimizer.named_parameters.values()]
    # A sum in fp64 of finite fp32 numbers is finite.
    count = torch.stack([~torch.isfinite(shard.sum(dtype=torch.float64)) for shard in shards]).any().long()
    dist.all_reduce(count)
    return int(count)


class Recovery:
    """Bad steps are left out; after too many in a row, or with a weight lost, the run rolls back, within a budget."""

    def __init__(self, config: AnomalyConfig, extra: Mapping[str, Any]) -> None:
        kept = extra.get("anomaly", {})
        self.config = config
        self.rollbacks, self.in_row = int(kept.get("rollbacks", 0)), int(kept.get("in_row", 0))
        self.first_bad = int(kept.get("first_bad", 0))
        """The first step of the row."""

    def good_step(self) -> None:
        self.in_row = 0

    def must_roll_back(self, seen: BadStep) -> bool:
        """Raises NumericalError when the budget is spent."""
        self.in_row += 1
        if self.in_row == 1:
            self.first_bad = seen.step
        if not seen.hopeless and self.in_row <= self.config.max_skips:
            return False
        if self.rollbacks >= self.config.max_rollbacks:
            raise NumericalError(
                f"step {seen.step}: {seen.reason}; {self.in_row} bad steps in a row, and the run has rolled back "
                f"{self.rollbacks} times already (resilience.anomaly.max_rollbacks); {_REMEDY}"
            )
        return True

    def rolled_back(self) -> None:
        self.rollbacks, self.in_row = self.rollbacks + 1, 0

    def nowhere_to_go(self, seen: BadStep) -> NumericalError:
        return NumericalError(
            f"step {seen.step}: {seen.reason}; {self.in_row} bad steps in a row, and there is no checkpoint from "
            f"before step {self.first_bad} to roll back to; {_REMEDY}"
        )

    def record(self) -> dict[str, Any]:
        """For a checkpoint's `extra`."""
        row = {"in_row": self.in_row, "first_bad": self.first_bad} if self.in_row else {"in_row": 0}
        return {"anomaly": {"rollbacks": self.rollbacks, **row}}


def _whose(ranks: list[int]) -> str:
    if not ranks:
        return ""
    shown = ", ".join(str(rank) for rank in ranks[:_SHOWN])
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"; the loss is not finite on rank {shown}{more}"
