"""How hyperparameters follow the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from disttrain.schedule import Scaled, scale_by_batch


@pytest.mark.parametrize("k", [0.25, 1.0, 4.0])
def test_the_rules(k: float) -> None:
    assert scale_by_batch("none", k, (0.9, 0.95), True) == Scaled()
    assert scale_by_batch("linear", k).lr == k
    assert scale_by_batch("sqrt", k, (0.9, 0.95)) == Scaled(lr=math.sqrt(k))
    full = scale_by_batch("sqrt_full", k, (0.9, 0.95))
    assert (full.lr, full.eps) == (math.sqrt(k), 1 / math.sqrt(k))
    assert full.betas == (pytest.approx(1 - 0.1 * k), pytest.approx(1 - 0.05 * k))


@pytest.mark.parametrize("rule", ["linear", "sqrt", "sqrt_full"])
def test_the_time_scale_of_decay_is_kept(rule: str) -> None:
    """batch / (lr weight_decay) tokens."""
    scaled = scale_by_batch(rule, 3.0, (0.9, 0.95), keep_decay_timescale=True)  # type: ignore[arg-type]
    assert 3.0 / (scaled.lr * scaled.weight_decay) == pytest.approx(1.0)
    assert scale_by_batch(rule, 3.0, (0.9, 0.95)).weight_decay == 1.0  # type: ignore[arg-type]


def test_a_beta_that_would_forget_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 - 10 \(1 - 0\.9\)"):
        scale_by_batch("sqrt_full", 10.0, (0.9, 0.999))


def wandered(k: int, rule: str) -> float:
    """How far Adam gets in pure noise on the tokens of 1600 steps of the base, with a batch `k` times as large."""
    scaled = scale_by_batch(rule, k, (0.9, 0.95))  # type: ignore[arg-type]
    (beta1, beta2), eps = scaled.betas or (0.9, 0.95), 1e-8 * scaled.eps
    draws = np.random.default_rng(0)
    weight, mean, square = np.zeros(500), np.zeros(500), np.zeros(500)
    for step in range(1, 1600 // k + 1):
        gradient = draws.normal(size=500) / math.sqrt(k)
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        weight -= 1e-3 * scaled.lr * mean / (1 - beta1**step) / (np.sqrt(square / (1 - beta2**step)) + eps)
    return math.sqrt((weight**2).mean())


def test_in_noise_the_root_rule_goes_as_far_on_as_many_tokens() -> None:
    base = wandered(1, "none")
    assert wandered(4, "none") / base == pytest.approx(0.5, rel=0.1)
    assert wandered(4, "sqrt") / base == pytest.approx(1.0, rel=0.1)
    assert wandered(4, "sqrt_full") / base == pytest.approx(1.0, rel=0.1)
    assert wandered(4, "linear") / base == pytest.approx(2.0, rel=0.1)
