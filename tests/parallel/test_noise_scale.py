"""The gradient noise scale: what a step measures on every layout, and what its estimates are on average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

from disttrain.models import init_parameters
from disttrain.optim.noise_scale import ENOUGH, NoiseScale, noise_estimates
from disttrain.testing import RankPool
from disttrain.testing.optimizer_parity import STRATEGIES
from disttrain.testing.parity import LENGTH, MODELS
from disttrain.train.build import build_gpt

LAYOUTS = [
    *((name, settings, 4) for name, settings in STRATEGIES.items()),
    ("unsharded", {"strategy": "fsdp", "grad_accumulation": "unsharded"}, 2),
    ("alone under ddp", {"strategy": "ddp"}, 1),
    ("alone under fsdp", {"strategy": "fsdp"}, 1),
    ("alone under zero1", {"strategy": "zero1"}, 1),
]


@pytest.mark.parametrize(("name", "settings", "world"), LAYOUTS, ids=[name for name, _, _ in LAYOUTS])
def test_every_layout_sees_the_gradients_before_they_are_summed(
    pool: RankPool, name: str, settings: dict[str, Any], world: int
) -> None:
    """Ranks have unequal numbers of valid tokens, the last of four none at all."""
    ranks = pool.run("tests.parallel.noise_jobs:measured", world, settings=settings)
    squares = sum(square for _, _, plain, _ in ranks for square in plain)
    sizes = [size for *_, own in ranks for size in own]
    assert len(sizes) == world * (1 if name in ("ddp", "zero1", "unsharded") else 3)
    for chunks, chunk_squares, _, _ in ranks:
        assert chunks == pytest.approx(squares, rel=1e-6)  # norms travel in fp32 or finer
        assert chunk_squares == sum(size**2 for size in sizes)


def per_sample_quadratic() -> Tensor:
    """Gradients [samples, parameters] of |x w - y|^2 / 2 at a point."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    y = x @ torch.ones(6, dtype=torch.float64) + 2 * torch.randn(400, generator=generator, dtype=torch.float64)
    return (x @ torch.full((6,), 0.3, dtype=torch.float64) - y)[:, None] * x


def per_sample_gpt() -> Tensor:
    """Gradients [sequences, parameters] of a small GPT's mean loss per token."""
    gpt = build_gpt(MODELS["gpt2"], LENGTH, torch.device("cpu"), torch.float64)
    init_parameters(gpt, seed=0)
    weights = {name: p.detach() for name, p in gpt.named_parameters()}
    tokens = torch.randint(9, (64, LENGTH + 1), generator=torch.Generator().manual_seed(0))

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(gpt, weights, (row[None, :-1], row[None, 1:])) / LENGTH

    rows = [torch.cat([g.flatten() for g in grad(loss)(weights, row).values()]) for row in tokens]
    return torch.stack(rows)


@pytest.mark.parametrize("gradients", [per_sample_quadratic(), per_sample_gpt()], ids=["quadratic", "gpt"])
def test_the_estimates_are_right_on_average(gradients: Tensor) -> None:
    """Over 2,000 draws at fixed weights, with chunks of 1 to 8 samples, inside 99.9 % confidence intervals."""
    mean = gradients.mean(0)
    exact_signal, exact_noise = mean.square().sum(), (gradients - mean).square().sum(1).mean()
    generator, sizes = torch.Generator().manual_seed(1), [1, 8, 3, 4]
    draws = []
    for _ in range(2000):
        picked = torch.randint(len(gradients), (sum(sizes),), generator=generator)
        parts = [gradients[part].sum(0) / sum(sizes) for part in picked.split(sizes)]
        total, chunks = torch.stack(parts).sum(0).square().sum(), torch.stack(parts).square().sum()
        draws.append(torch.stack(noise_estimates(total, chunks, sum(sizes), sum(size**2 for size in sizes))))
    seen = torch.stack(draws)
    signal, noise = seen.mean(0)
    half_widths = 3.29 * seen.std(0) / math.sqrt(len(seen))
    print(f"|G|^2 {signal:.4g} +- {half_widths[0]:.2g}, exactly {exact_signal:.4g}")
    print(f"tr(S) {noise:.4g} +- {half_widths[1]:.2g}, exactly {exact_noise:.4g}")
    assert abs(signal - exact_signal) < half_widths[0]
    assert abs(noise - exact_noise) < half_widths[1]
    assert half_widths[1] < 0.2 * exact_noise


def test_averages_come_before_the_ratio() -> None:
    scale = NoiseScale(torch.device("cpu"))
    assert scale.record(64) == {}
    for chunks in (0.9, 0.3):
        scale.add(torch.tensor(1.0), torch.tensor(chunks), 100, 5_000)
    signals, noises = [0.2, 1.4], [80.0, -40.0]
    weights = [0.98 * 0.02, 0.02]
    ratio = sum(w * n for w, n in zip(weights, noises, strict=True)) / sum(
        w * s for w, s in zip(weights, signals, strict=True)
    )
    assert scale.record(8)["noise_scale_tokens"] == pytest.approx(ratio, rel=1e-5)
    assert scale.record(8)["suggested_batch_tokens"] == round(ratio / 8) * 8


def test_what_tells_nothing_teaches_nothing() -> None:
    scale = NoiseScale(torch.device("cpu"))
    for total, tokens, squares in ((1.0, 100, 10_000), (math.inf, 100, 5_000), (math.nan, 100, 5_000), (0.0, 0, 0)):
        scale.add(torch.tensor(total), torch.tensor(0.5), tokens, squares)
    assert scale.averages.tolist() == [0, 0, 0]


def test_decisions_wait_for_eleven_measurements() -> None:
    scale = NoiseScale(torch.device("cpu"))
    known = []
    for _ in range(12):
        scale.add(torch.tensor(1.0), torch.tensor(0.9), 100, 5_000)
        known.append(scale.tokens(least_weight=ENOUGH) is not None)
    assert known.index(True) == 11
    assert scale.tokens() is not None


def test_copies_that_scatter_nothing_are_not_measured(pool: RankPool) -> None:
    settings = {"strategy": "hsdp", "dp_replicate": 2, "dp_shard": 1}
    assert pool.run("tests.parallel.noise_jobs:unmeasured", 2, settings=settings) == [True, True]
