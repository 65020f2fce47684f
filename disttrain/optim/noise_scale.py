"""The gradient noise scale (arXiv 1812.06162): at which batch noise and signal of a gradient are alike."""

from __future__ import annotations

import torch
from torch import Tensor

DECAY = 0.98
"""Of the averages, for each measurement."""
ENOUGH = 0.2
"""Weight from which the averages are good for a decision: eleven measurements."""


def noise_estimates(total: Tensor, chunks: Tensor, tokens: int, squares: int) -> tuple[Tensor, Tensor]:
    """Unbiased estimates of |G|^2, the true gradient's, and of tr(S), the covariance of one token's; scalars.

    `total` is |g|^2 of the step's gradient over `tokens`; g is the sum of chunks of n_c tokens each, of which `chunks`
    is the sum of |g_c|^2, and `squares` that of n_c^2. With E|g|^2 = |G|^2 + tr / tokens and
    E|g_c|^2 = (n_c / tokens)^2 |G|^2 + n_c tr / tokens^2 both follow for any n_c. One chunk alone tells nothing: NaN.
    """
    rest = 1 - squares / tokens**2 if tokens else 0.0
    signal = (total - chunks) / rest if rest > 0 else torch.full_like(total, float("nan"))
    return signal, tokens * (total - signal)


class NoiseScale:
    """Averages of both estimates on the device; their ratio, never an average of ratios."""

    def __init__(self, device: torch.device) -> None:
        self.averages = torch.zeros(3, dtype=torch.float64, device=device)
        """Of |G|^2, of tr(S), and the weight of what has been seen."""

    def add(self, total: Tensor, chunks: Tensor, tokens: int, squares: int) -> None:
        """One measurement, of values that are equal on all ranks; such that are not finite teach nothing."""
        signal, noise = noise_estimates(total, chunks, tokens, squares)
        seen = torch.stack([signal, noise, torch.ones_like(signal)]).to(self.averages)
        self.averages.copy_(torch.where(seen.isfinite().all(), self.averages.lerp(seen, 1 - DECAY), self.averages))

    def tokens(self, least_weight: float = 0.0) -> float | None:
        """The noise scale; None before measurements of that weight, and while noise hides the signal. Waits for the
        device."""
        signal, noise, weight = self.averages.tolist()
        return noise / signal if signal > 0 and noise > 0 and weight >= least_weight else None

    def record(self, multiple: int) -> dict[str, float]:
        """`noise_scale_tokens`, and the batch that it suggests: the nearest multiple of `multiple` tokens."""
        tokens = self.tokens()
        if tokens is None:
            return {}
        return {"noise_scale_tokens": tokens, "suggested_batch_tokens": max(1, round(tokens / multiple)) * multiple}

    def state(self) -> dict[str, Tensor]:
        return {"service.noise_scale.averages": self.averages}
