"""What stands around an optimizer's step: a verdict and clipping before it, a limit on updates and QK-Clip after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from disttrain.config import OptimConfig
from disttrain.config.resilience import AnomalyConfig
from disttrain.models import ShardingPlan
from disttrain.optim.anomaly import AnomalyJudge
from disttrain.optim.clip import GradientClipper
from disttrain.optim.optimizer_set import OptimizerSet
from disttrain.optim.qk_clip import QKClip
from disttrain.optim.sharding import local
from disttrain.optim.update_limit import UpdateLimit


@dataclass(frozen=True)
class Safeguards:
    clipper: GradientClipper
    update_limit: UpdateLimit | None = None
    qk_clip: QKClip | None = None
    judge: AnomalyJudge | None = None

    def describe(self) -> list[str]:
        """Lines for the start of a run."""
        limit, qk_clip = self.update_limit, self.qk_clip
        limited = f"no parameter moves by more than {limit.max_ratio:g} of its norm in a step" if limit else None
        watching = qk_clip.describe() if qk_clip else None
        return [*self.clipper.notes(), *(line for line in (limited, watching) if line)]


def build_safeguards(
    model: nn.Module,
    optimizer: OptimizerSet,
    config: OptimConfig,
    plan: ShardingPlan,
    *,
    device: torch.device,
    steps: int | None = None,
    anomaly: AnomalyConfig | None = None,
) -> Safeguards:
    """As `config` says, for the parameters of `optimizer`, a run of `steps`, and attention that computes on `device`;
    with `anomaly`, steps are judged where the gradients are.

    Raises UserError for rules that do not fit the model, on every rank alike.
    """
    parameters = optimizer.named_parameters
    qk_clip, ratio = config.resolved_qk_clip, config.max_update_ratio
    where = local(next(iter(parameters.values()))).device
    return Safeguards(
        GradientClipper(optimizer.param_groups, list(parameters), plan, steps),
        UpdateLimit(list(parameters.values()), ratio) if ratio else None,
        None if qk_clip.mode == "off" else QKClip(model, qk_clip, device, optimizer.points),
        AnomalyJudge(anomaly, where) if anomaly else None,
    )
