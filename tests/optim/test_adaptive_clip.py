"""Clipping that remembers, without processes: the statistics, the schedule, and a long run of drawn norms."""

from __future__ import annotations

import math
from statistics import fmean, pvariance

import pytest
import torch
from torch import Tensor

from disttrain.config.clipping import AdaptiveClip, ZClip
from disttrain.optim.clip_rules import Seen
from disttrain.optim.clip_statistics import (
    SEED_STEPS,
    AdaptiveRule,
    ZClipRule,
    log_norm_threshold,
    log_norm_update,
    z_at,
)
from disttrain.optim.clip_units import Unit

CPU = torch.device("cpu")
STEPS, SHIFTED, NOISE = 20_000, 12_000, 0.15


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seen(norms: Tensor, finite: bool = True) -> Seen:
    """One parameter a unit."""
    squares = norms.square()
    return Seen(squares, lambda order, over: squares.sum().sqrt(), [], torch.tensor(finite))


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    """Log-norms that fall by a factor of 8 at first, with 15 % of noise, and 60 spikes by 4 to 30; the last of four
    columns rises for good by a factor of 3 at `SHIFTED`; and what `AdaptiveClip` makes of them, at importance 1, 1.5, 2
    and 1."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(STEPS, dtype=torch.float64)
    usual = math.log(8) * torch.exp(-t / 1000)
    logs = usual + NOISE * torch.randn(STEPS, generator=generator, dtype=torch.float64)
    spikes = torch.zeros(STEPS, dtype=torch.bool)
    at = 200 + torch.randperm(STEPS - 200, generator=generator)[:60]
    spiked = logs.clone()
    spiked[at] += (4 + 26 * torch.rand(60, generator=generator, dtype=torch.float64)).log()
    spikes[at] = True
    columns = torch.stack([spiked, spiked, spiked, logs + math.log(3) * (t > SHIFTED)], dim=1)
    clip, importance, until = AdaptiveClip(), fp64(1, 1.5, 2, 1), STEPS // 2
    moments = (torch.zeros(4).double(), torch.zeros(4).double(), torch.zeros(4).double())
    thresholds = []
    for values in columns:
        thresholds.append(log_norm_threshold(moments, importance, clip, until))
        moments = log_norm_update(moments, values, clip)
    clipped = columns > torch.stack(thresholds).log()
    residual = torch.minimum(columns, torch.stack(thresholds).log()) - usual[:, None]
    return {"clipped": clipped, "spikes": spikes, "residual": residual, "deviation": moments[1].sqrt()}


@pytest.mark.parametrize(("column", "false_share", "left_over"), [(0, 0.008, 1.6), (1, 0.045, 1.4), (2, 0.095, 1.3)])
def test_spikes_are_caught_and_few_others(
    drawn: dict[str, Tensor], column: int, false_share: float, left_over: float
) -> None:
    """More important units are held tighter: they are clipped by mistake more often, and keep less of a spike."""
    clipped, spikes = drawn["clipped"][:, column], drawn["spikes"]
    assert clipped[spikes].all()
    assert 0 < (clipped & ~spikes).double().mean() < false_share
    assert drawn["residual"][spikes, column].median().exp() < left_over
    # The statistics do not narrow themselves, however tight the threshold.
    assert drawn["deviation"][column] == pytest.approx(NOISE, rel=0.35)


def test_a_new_level_is_followed(drawn: dict[str, Tensor]) -> None:
    clipped = drawn["clipped"][:, 3]
    assert clipped[SHIFTED + 1]
    first_free = int((~clipped[SHIFTED + 1 :]).nonzero()[0])
    assert first_free < 30
    assert clipped[SHIFTED + 100 : SHIFTED + 1100].double().mean() < 0.03


def test_late_is_stricter_than_early(drawn: dict[str, Tensor]) -> None:
    false = drawn["clipped"] & ~drawn["spikes"][:, None]
    early, late = false[100:2000, :3].double().mean(0), false[STEPS // 2 :, :3].double().mean(0)
    assert (early < late / 3).all()


def test_the_first_statistics_are_those_of_the_first_norms() -> None:
    values = [0.3 * math.sin(7 * i) for i in range(SEED_STEPS)]
    moments = (fp64(0), fp64(0), fp64(0))
    for value in values:
        moments = log_norm_update(moments, fp64(value), AdaptiveClip())
    mean, variance, count = (moment.item() for moment in moments)
    assert (mean, variance, count) == (pytest.approx(fmean(values)), pytest.approx(pvariance(values)), SEED_STEPS)


def test_the_schedule_goes_from_early_to_late() -> None:
    clip = AdaptiveClip(early=4.0, late=2.0, tighten_from=100)
    assert z_at(fp64(0, 100, 150, 200, 10_000), clip, 200).tolist() == pytest.approx([4, 4, 3, 2, 2])


def units(*importance: float) -> list[Unit]:
    return [Unit(f"u{index}", value, [index]) for index, value in enumerate(importance)]


def warm_rule(clip: AdaptiveClip) -> AdaptiveRule:
    rule = AdaptiveRule(clip, units(1, 1, 1), 1000, CPU)
    for step in range(40):
        rule.decide(seen(torch.exp(fp64(0.1, -0.1, 0.05) * (-1) ** step)))
    return rule


CLIP = AdaptiveClip(warmup_steps=30)


def test_a_layer_that_jumps_is_clipped_alone() -> None:
    decision = warm_rule(CLIP).decide(seen(fp64(1, 30, 1)))
    assert decision.factors.tolist() == [1, pytest.approx(decision.factors[1].item()), 1]
    assert 0.03 < decision.factors[1] < 0.1
    assert decision.share == pytest.approx(1 / 3)


def test_the_warm_up_only_looks() -> None:
    rule = AdaptiveRule(CLIP, units(1, 1, 1), 1000, CPU)
    for _ in range(CLIP.warmup_steps):
        assert rule.decide(seen(fp64(1, 1e6, 1e-6))).factors.tolist() == [1, 1, 1]
    assert rule.decide(seen(fp64(1, 1e8, 1e-6))).factors[1] < 0.1


@pytest.mark.parametrize(("norms", "finite"), [((math.nan, 1, 1), False), ((1, math.inf, 1), False)])
def test_a_step_that_is_not_finite_teaches_nothing(norms: tuple[float, ...], finite: bool) -> None:
    rule = warm_rule(CLIP)
    before = rule.state.clone()
    rule.decide(seen(fp64(*norms), finite))
    assert torch.equal(rule.state, before)


def test_a_unit_without_gradient_learns_nothing_and_stops_nobody() -> None:
    rule = warm_rule(CLIP)
    before = rule.state.clone()
    assert rule.decide(seen(fp64(1, 0, 1))).factors.tolist() == [1, 1, 1]
    assert torch.equal(rule.state[1], before[1])
    assert not torch.equal(rule.state[0], before[0])


def test_one_tiny_norm_does_not_open_the_threshold() -> None:
    rule = warm_rule(CLIP)
    usual = rule.decide(seen(fp64(1, 1, 1))).thresholds
    rule.decide(seen(fp64(1, 1e-7, 1)))
    after = rule.decide(seen(fp64(1, 1, 1))).thresholds
    assert usual is not None
    assert after is not None
    assert usual[1] < after[1] < 1.5 * usual[1]


def test_each_unit_counts_its_own_steps() -> None:
    clip = AdaptiveClip(warmup_steps=2, early=4.0, late=1.0, min_deviation=1.0)
    rule = AdaptiveRule(clip, units(1, 1), 10, CPU)
    for step in range(10):
        rule.decide(seen(fp64(1, 0 if step < 7 else 1)))
    assert rule.state[:, 2].tolist() == [10, 3]
    thresholds = rule.decide(seen(fp64(1, 1))).thresholds
    assert thresholds is not None
    assert thresholds.log().tolist() == pytest.approx([1.0, 1 + 3 * 0.5 * (1 + math.cos(0.3 * math.pi))])


def test_an_absolute_limit_holds_below_the_threshold_and_in_the_warm_up() -> None:
    first = AdaptiveRule(AdaptiveClip(limit=0.5), units(1, 1), 10, CPU)
    assert first.decide(seen(fp64(2, 0.4))).factors.tolist() == [0.25, 1]
    decision = warm_rule(AdaptiveClip(warmup_steps=30, limit=0.5)).decide(seen(fp64(1, 1, 0.4)))
    assert decision.factors.tolist() == [0.5, 0.5, 1]


def test_streaks_count_steps_cut_below_one_half() -> None:
    rule, streaks = warm_rule(CLIP), []
    for norm in (30.0, 30.0, 1.0, 30.0):
        rule.decide(seen(fp64(1, norm, 1)))
        streaks.append(rule.state[:, 3].tolist())
    assert streaks == [[0, 1, 0], [0, 2, 0], [0, 0, 0], [0, 1, 0]]


def test_zclip_is_the_authors() -> None:
    """Their ZClip (zscore, adaptive_scaling) with warmup_steps=5, alpha=0.9 and no max_grad_norm, on these norms."""
    norms = [1.0 + 0.1 * math.sin(3 * i) for i in range(16)]
    norms[8], norms[12], norms[14] = 6.0, 1.5, 40.0
    expected = norms.copy()
    expected[8], expected[12], expected[14] = 1.005789433627, 1.058471996541, 1.024620800308
    rule = ZClipRule(ZClip(warmup_steps=5, decay=0.9, max_norm=0.0), 1, CPU)
    after = [norm * rule.decide(seen(fp64(norm))).factors.item() for norm in norms]
    assert after == pytest.approx(expected, rel=2e-6)  # they add 1e-6 to the norm only where they clip
    assert rule.state[0, :2].tolist() == pytest.approx([1.0301903836244741, 0.003278485774243942], rel=1e-6)


def test_zclip_holds_its_largest_norm_from_the_start() -> None:
    rule = ZClipRule(ZClip(max_norm=2.0), 1, CPU)
    assert rule.decide(seen(fp64(8.0))).factors.item() == pytest.approx(0.25, rel=1e-6)
    assert rule.decide(seen(fp64(1.0))).factors.item() == 1.0
