"""Clipping, the limit on updates and QK-Clip on whole tensors, in Python's own numbers, straight from the formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean, pvariance
from typing import Any

import torch
from torch import Tensor

from disttrain.config import ModelConfig
from disttrain.config.clipping import AGC, AdaptiveClip, ClipNorm, ClipValue, QKClipConfig, ZClip
from disttrain.config.groups import Group
from disttrain.models import GPT_PLAN

Tensors = Mapping[str, Tensor]


class ReferenceClipper:
    """Each group's gradients after its own rule, step by step; groups come with the names of their parameters."""

    def __init__(self, groups: Sequence[tuple[Group, Sequence[str]]], steps: int) -> None:
        self.groups, self.steps = groups, steps
        self.history: dict[tuple[str, str], dict[str, Any]] = {}
        """Of a group's unit: the values so far, and mean and variance."""

    def clip(self, gradients: Tensors, weights: Tensors) -> dict[str, Tensor]:
        clipped = dict(gradients)
        together: dict[str, float] = {}
        for group, names in self.groups:
            clip: Any = group.clip
            own = {name: gradients[name] for name in names}
            if isinstance(clip, ClipNorm | ZClip):
                norm = _norm(gradients if clip.over == "all" else own, getattr(clip, "order", 2.0))
                limit = clip.limit if isinstance(clip, ClipNorm) else self._zclip_limit(group, clip, norm)
                clipped |= {name: gradient * min(1.0, limit / (norm + 1e-6)) for name, gradient in own.items()}
            elif isinstance(clip, ClipValue):
                clipped |= {name: gradient.clamp(-clip.limit, clip.limit) for name, gradient in own.items()}
            elif isinstance(clip, AGC):
                clipped |= {name: _agc(clip, name, gradient, weights[name]) for name, gradient in own.items()}
            elif isinstance(clip, AdaptiveClip):
                clipped |= self._adaptive(group, clip, own)
                together[group.name] = clip.max_norm or 0.0
        limited = [name for group, names in self.groups if together.get(group.name) for name in names]
        after = _norm({name: clipped[name] for name in limited}) if limited else 0.0
        for group, names in self.groups:
            if limit := together.get(group.name, 0.0):
                clipped |= {name: clipped[name] * min(1.0, limit / (after + 1e-6)) for name in names}
        return clipped

    def _zclip_limit(self, group: Group, clip: ZClip, norm: float) -> float:
        known = self.history.setdefault((group.name, ""), {"values": []})
        limit = clip.max_norm or math.inf
        if len(known["values"]) < clip.warmup_steps:
            known["values"].append(norm)
            known["mean"], known["variance"] = fmean(known["values"]), pvariance(known["values"])
            return limit
        deviation = math.sqrt(known["variance"])
        z = (norm - known["mean"]) / (deviation + 1e-6)
        counted = norm
        if z > clip.z:
            counted = known["mean"] + clip.z * deviation * clip.z / z
            limit = min(limit, counted)
            counted = min(counted, norm)
        known["mean"] = clip.decay * known["mean"] + (1 - clip.decay) * counted
        known["variance"] = clip.decay * known["variance"] + (1 - clip.decay) * (counted - known["mean"]) ** 2
        return limit

    def _adaptive(self, group: Group, clip: AdaptiveClip, gradients: Tensors) -> dict[str, Tensor]:
        clipped: dict[str, Tensor] = {}
        units: dict[str, list[str]] = {}
        for name in gradients:
            units.setdefault(_unit(clip, name)[0], []).append(name)
        for unit, names in units.items():
            norm = _norm({name: gradients[name] for name in names})
            known = self.history.setdefault((group.name, unit), {"values": []})
            threshold = self._threshold(clip, known, _unit(clip, names[0])[1])
            clipped |= {name: gradients[name] * min(1.0, threshold / norm) for name in names}
            _learn(clip, known, math.log(norm + 1e-12))
        return clipped

    def _threshold(self, clip: AdaptiveClip, known: dict[str, Any], importance: float) -> float:
        t = len(known["values"])
        if t < clip.warmup_steps:
            return clip.limit or math.inf
        until = clip.tighten_until or self.steps // 2
        progress = min(1.0, max(0.0, (t - clip.tighten_from) / (until - clip.tighten_from)))
        z = clip.late + (clip.early - clip.late) * (1 + math.cos(math.pi * progress)) / 2
        deviation = max(math.sqrt(known["variance"]), clip.min_deviation)
        return min(math.exp(known["mean"] + z / importance * deviation), clip.limit or math.inf)


def _learn(clip: AdaptiveClip, known: dict[str, Any], value: float) -> None:
    known["values"].append(value)
    if len(known["values"]) <= min(20, clip.warmup_steps):
        known["mean"], known["variance"] = fmean(known["values"]), pvariance(known["values"])
        return
    deviation = max(math.sqrt(known["variance"]), clip.min_deviation)
    most = clip.winsor * deviation
    step = max(-most, min(most, value - known["mean"]))
    known["mean"] += (1 - clip.decay) * step
    known["variance"] = clip.decay * (known["variance"] + (1 - clip.decay) * step**2)


def _unit(clip: AdaptiveClip, name: str) -> tuple[str, float]:
    """The unit of a GPT's parameter, and its importance; of a model with two layers both are edges."""
    layer = re.search(r"blocks\.(\d+)", name)
    edge = clip.edge_importance if layer else 1.0
    kinds = [rule for rule in clip.unit_rules if any(re.search(_pattern(rule), name) for rule in rule.match)]
    kind, importance = (kinds[0].name, kinds[0].importance) if kinds else ("rest", 1.0)
    return kind + (f".{layer[1]}" if layer else ""), min(2.0, importance * edge)


def _agc(clip: AGC, name: str, gradient: Tensor, weight: Tensor) -> Tensor:
    if any(re.search(_pattern(rule), name) for rule in clip.skip):
        return gradient
    if gradient.ndim < 2:
        return gradient * min(
            1.0, clip.limit * max(_norm({"": weight}), clip.eps) / (_norm({"": gradient}) or math.inf)
        )
    rows = zip(gradient, weight, strict=True)
    return torch.stack([g * _agc_factor(clip, g, w) for g, w in rows])


def _agc_factor(clip: AGC, gradient: Tensor, weight: Tensor) -> float:
    norm = gradient.norm().item()
    return min(1.0, clip.limit * max(weight.norm().item(), clip.eps) / norm) if norm else 1.0


def _pattern(rule: str) -> str:
    return GPT_PLAN.roles[rule.removeprefix("role:")] if rule.startswith("role:") else rule


def limited_update(before: Tensors, after: Tensors, max_ratio: float) -> dict[str, Tensor]:
    """Weights whose steps are at most `max_ratio` times their norms, which count as at least 1e-3 an element."""
    limited = {}
    for name, old in before.items():
        length = (after[name] - old).norm().item()
        allowed = max_ratio * max(old.norm().item(), 1e-3 * math.sqrt(old.numel()))
        limited[name] = old + (after[name] - old) * min(1.0, allowed / length) if length else old
    return limited


def reference_qk_clip(
    config: ModelConfig, clip: QKClipConfig, weights: Tensors, scores: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Weights after QK-Clip by the masked scores [heads, batch, length, length] of each layer, head by head."""
    clipped = {name: weight.clone() for name, weight in weights.items()}
    group, width = config.n_heads // config.kv_heads, config.head_dim
    alpha = 1.0 if group > 1 and clip.grouped == "q_only" else clip.alpha
    for layer, of_layer in enumerate(scores):
        seen = of_layer if clip.logits == "exact" else torch.logsumexp(of_layer, dim=-1)
        gammas = [
            min(1.0, clip.threshold / largest) if largest > 0 else 1.0 for largest in seen.flatten(1).amax(1).tolist()
        ]
        for key_head in range(config.kv_heads):
            own = gammas[key_head * group : (key_head + 1) * group]
            key = min(own) ** (1 - alpha)
            for part in ("weight", "bias"):
                name = f"blocks.{layer}.attention.w{{}}.{part}"
                if name.format("q") not in clipped:
                    continue
                clipped[name.format("k")][key_head * width : (key_head + 1) * width] *= key
                for index, gamma in enumerate(own, start=key_head * group):
                    clipped[name.format("q")][index * width : (index + 1) * width] *= gamma / key
    return clipped


def _norm(tensors: Tensors, order: float = 2.0) -> float:
    absolute = torch.cat([tensor.flatten() for tensor in tensors.values()]).abs()
    return absolute.max().item() if math.isinf(order) else ((absolute**order).sum() ** (1 / order)).item()
