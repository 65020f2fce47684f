"""What a log row tells of what is clipped by its history, of limited updates, and of attention logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from disttrain.engines import UpdateResult
from disttrain.optim import OptimizerSet, Safeguards
from disttrain.optim.clip import UnitClips

STREAK = 3
"""Steps in a row with a unit cut below one half that are worth a warning: that is no spike any more."""


class SafeguardMetrics:
    """Values stay on the device between log rows and are equal on all ranks; empty where nothing of it is on."""

    _clipped: Tensor | float
    _streaks: Tensor | float
    _limited: Tensor | float
    _heads: Tensor | float

    def __init__(self, optimizer: OptimizerSet, safeguards: Safeguards) -> None:
        self.units = safeguards.clipper.unit_names
        self.limit = safeguards.update_limit
        self.group_of = [group["name"] for group in optimizer.param_groups for _ in group["params"]]
        self._warned: set[str] = set()
        self.clear()

    def add(self, update: UpdateResult) -> None:
        """One more step."""
        self._steps += 1
        if (units := update.norms.units) is not None:
            self._clipped = self._clipped + (units.scales < 1)
            self._streaks = torch.maximum(units.streaks, _tensor(self._streaks, units.streaks))
        if self.limit is not None and update.update_ratios is not None:
            self._limited = self._limited + (update.update_ratios > self.limit.max_ratio)
        if update.logits is not None:
            self._heads = self._heads + (update.logits.scales < 1).sum()

    def record(self, update: UpdateResult) -> dict[str, float]:
        """Of this step: `unit_norm/UNIT` (before clipping), `unit_threshold/UNIT` (none in the warm-up),
        `unit_scale/UNIT`; `update_ratio/GROUP`, the largest of its parameters before the limit;
        `max_attention_logit` and that of each LAYER, `qk_clip_scale`, the smallest factor of a head. Since the last
        record: `unit_clip_share/UNIT` of steps, `update_limit_share/GROUP` of updates, `qk_clip_heads` on average."""
        record: dict[str, float] = {}
        if update.norms.units is not None:
            record |= self._unit_record(update.norms.units)
        if update.update_ratios is not None:
            record |= self._ratio_record(update.update_ratios)
        if update.logits is not None:
            layers = update.logits.largest.amax(1).tolist()
            record["max_attention_logit"] = max(layers)
            record |= {f"max_attention_logit/{layer}": largest for layer, largest in enumerate(layers)}
            record["qk_clip_heads"] = float(self._heads) / self._steps
            record["qk_clip_scale"] = update.logits.scales.min().item()
        self.clear()
        return {key: value for key, value in record.items() if math.isfinite(value)}

    def warnings(self) -> list[str]:
        """Call before `record`: units that have been cut below one half for steps on end, each told when it begins."""
        if not self.units or not isinstance(self._streaks, Tensor):
            return []
        lasting = {n: int(s) for n, s in zip(self.units, self._streaks.tolist(), strict=True) if s >= STREAK}
        new = [name for name in lasting if name not in self._warned]
        self._warned = set(lasting)
        return [
            f"the gradient of {name} was cut below one half in {lasting[name]} steps in a row: its level has changed, "
            "or it diverges"
            for name in new
        ]

    def _unit_record(self, units: UnitClips) -> dict[str, float]:
        shares = _tensor(self._clipped, units.norms) / self._steps
        rows = torch.stack([units.norms, units.thresholds, units.scales, shares]).tolist()
        keys = ("unit_norm", "unit_threshold", "unit_scale", "unit_clip_share")
        return {
            f"{key}/{name}": value
            for key, row in zip(keys, rows, strict=True)
            for name, value in zip(self.units, row, strict=True)
        }

    def _ratio_record(self, ratios: Tensor) -> dict[str, float]:
        shares = (_tensor(self._limited, ratios) / self._steps).tolist()
        record: dict[str, float] = {}
        for name, members in _positions(self.group_of).items():
            record[f"update_ratio/{name}"] = max(ratios[members].tolist())
            record[f"update_limit_share/{name}"] = sum(shares[index] for index in members) / len(members)
        return record

    def clear(self) -> None:
        self._steps = 0
        self._clipped = self._streaks = self._limited = self._heads = 0.0


def _tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _positions(groups: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, name in enumerate(groups):
        found.setdefault(name, []).append(index)
    return found
