"""Clipping that remembers: thresholds from the history of norms. Pure math first; all of it on the device, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from disttrain.config.clipping import AdaptiveClip, ZClip
from disttrain.optim.clip_rules import ClipRule, Decision, Seen, clip_scale
from disttrain.optim.clip_units import Unit

Moments = tuple[Tensor, Tensor, Tensor]
"""Mean, variance (of the population), and how many values are in them."""
SEED_STEPS = 20
"""Log-norms that give the first mean and variance; from then on they are exponential averages."""
CUT_IN_HALF = 0.5


def plain_update(moments: Moments, value: Tensor) -> Moments:
    """One more value, all of equal weight (Welford 1962)."""
    mean, variance, count = moments
    grown = mean + (value - mean) / (count + 1)
    return grown, (count * variance + (value - mean) * (value - grown)) / (count + 1), count + 1


def log_norm_update(moments: Moments, value: Tensor, clip: AdaptiveClip) -> Moments:
    """One more log-norm: it counts as at most `winsor` deviations from the mean, wherever the threshold is, so that a
    tight threshold cannot narrow the very statistics that it comes from, nor one tiny norm open it for long."""
    mean, variance, count = moments
    most = clip.winsor * deviation(variance, clip)
    step = (value - mean).clamp(-most, most)
    averaged = (
        mean + (1 - clip.decay) * step,
        clip.decay * (variance + (1 - clip.decay) * step.square()),
        count + 1,
    )
    seeding = count < min(SEED_STEPS, clip.warmup_steps)
    pairs = zip(plain_update(moments, value), averaged, strict=True)
    first, second, third = (torch.where(seeding, seed, average) for seed, average in pairs)
    return first, second, third


def log_norm_threshold(moments: Moments, importance: Tensor, clip: AdaptiveClip, until: int) -> Tensor:
    """exp(mean + z / importance * deviation), at most `limit`, which alone holds in the warm-up."""
    mean, variance, count = moments
    threshold = torch.exp(mean + z_at(count, clip, until) / importance * deviation(variance, clip))
    return torch.where(count < clip.warmup_steps, math.inf, threshold).clamp(max=clip.limit or math.inf)


def z_at(steps: Tensor, clip: AdaptiveClip, until: int) -> Tensor:
    """From `early` to `late` by half a cosine, `steps` after the beginning."""
    progress = ((steps - clip.tighten_from) / (until - clip.tighten_from)).clamp(0, 1)
    return clip.late + (clip.early - clip.late) * 0.5 * (1 + torch.cos(math.pi * progress))


def deviation(variance: Tensor, clip: AdaptiveClip) -> Tensor:
    return variance.sqrt().clamp(min=clip.min_deviation)


def zclip_limit(moments: Moments, norm: Tensor, clip: ZClip) -> Tensor:
    """Without bound up to `z` deviations above the mean; above, the lower the higher the norm."""
    mean, variance, _ = moments
    z = (norm - mean) / (variance.sqrt() + 1e-6)
    return torch.where(z > clip.z, mean + clip.z * variance.sqrt() / (z / clip.z), math.inf)


def zclip_update(moments: Moments, value: Tensor, clip: ZClip) -> Moments:
    mean, variance, count = moments
    moved = clip.decay * mean + (1 - clip.decay) * value
    return moved, clip.decay * variance + (1 - clip.decay) * (value - moved).square(), count + 1


class ZClipRule(ClipRule):
    """State: mean, variance, count, and for how many steps in a row the norm was cut below one half; [1, 4]."""

    def __init__(self, clip: ZClip, count: int, device: torch.device) -> None:
        super().__init__(count)
        self.clip, self.over, self.names = clip, clip.over, (f"norm_of_{clip.over}",)
        self.state = torch.zeros(1, 4, dtype=torch.float64, device=device)

    def decide(self, seen: Seen) -> Decision:
        norm = seen.norm(2.0, self.over).reshape(1)
        mean, variance, count, streak = self.state.unbind(-1)
        moments, warm = (mean, variance, count), count >= self.clip.warmup_steps
        spike = torch.where(warm, zclip_limit(moments, norm, self.clip), math.inf)
        counted = torch.minimum(norm, spike)
        early, late = plain_update(moments, counted), zclip_update(moments, counted, self.clip)
        learned = [torch.where(warm, later, sooner) for sooner, later in zip(early, late, strict=True)]
        learned.append(torch.where(spike < CUT_IN_HALF * norm, streak + 1, 0.0))
        self.state.copy_(torch.where(seen.finite, torch.stack(learned, dim=1), self.state))
        threshold = spike.clamp(max=self.clip.max_norm or math.inf)
        scale = clip_scale(norm, threshold)
        return Decision(scale, (scale < 1).double().mean(), norm, threshold)


class AdaptiveRule(ClipRule):
    """State of each unit: mean and variance of its log-norms, their count, and for how many steps in a row it was cut
    below one half; [units, 4]."""

    def __init__(self, clip: AdaptiveClip, units: Sequence[Unit], until: int, device: torch.device) -> None:
        super().__init__(sum(len(unit.members) for unit in units))
        self.clip, self.until, self.max_norm = clip, until, clip.max_norm or 0.0
        self.names, self.parts = [unit.name for unit in units], [unit.members for unit in units]
        self.importance = torch.tensor([unit.importance for unit in units], dtype=torch.float64, device=device)
        self.state = torch.zeros(len(units), 4, dtype=torch.float64, device=device)

    def decide(self, seen: Seen) -> Decision:
        norms = self.part_squares(seen.squares).sqrt()
        mean, variance, count, streak = self.state.unbind(-1)
        thresholds = log_norm_threshold((mean, variance, count), self.importance, self.clip, self.until)
        factors = (thresholds / norms).clamp(max=1.0)
        learned = log_norm_update((mean, variance, count), torch.log(norms + 1e-12), self.clip)
        streak = torch.where(factors < CUT_IN_HALF, streak + 1, 0.0)
        # A unit without a gradient has no norm to learn from.
        known = (seen.finite & (norms > 0))[:, None]
        self.state.copy_(torch.where(known, torch.stack([*learned, streak], dim=1), self.state))
        return Decision(factors, (factors < 1).double().mean(), norms, thresholds)
