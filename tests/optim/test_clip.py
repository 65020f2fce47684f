"""The global gradient norm on every layout, and clipping by it."""

import math

import pytest
import torch
from torch import nn

from disttrain.config.clipping import Clip, ClipNorm, ClipValue, NoClip
from disttrain.optim.clip import clip_scale
from disttrain.testing import RankPool
from tests.optim.jobs import whole_gradients

JOBS = "tests.optim.jobs"


def norm_of_one_process() -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in whole_gradients().values()))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_norm_is_that_of_one_process_by_one_all_reduce(pool: RankPool, world: int) -> None:
    results = pool.run(f"{JOBS}:mixed_norm", world)
    assert len({norm for norm, _ in results}) == 1
    for norm, calls in results:
        assert norm == pytest.approx(norm_of_one_process(), rel=1e-13)
        assert list(calls.values()) == [1]
        assert "allreduce" in next(iter(calls))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_norm_of_real_fsdp_gradients(pool: RankPool, world: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    model(torch.arange(20.0, dtype=torch.float64).reshape(4, 5).sin()).square().sum().backward()
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    assert pool.run(f"{JOBS}:fsdp_norm", world) == pytest.approx([expected] * world, rel=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoilt_rank", [0, 1])
def test_one_bad_number_is_known_to_all(pool: RankPool, value: float, spoilt_rank: int) -> None:
    for norm, scale in pool.run(f"{JOBS}:spoilt_norm", 2, value=value, spoilt_rank=spoilt_rank):
        assert not math.isfinite(norm)
        assert math.isnan(norm) == math.isnan(value)
        assert not scale > 0  # NaN, or zero: never a number that hides it


def test_no_gradients_at_all(pool: RankPool) -> None:
    assert pool.run(f"{JOBS}:nothing_to_norm", 2) == [0.0, 0.0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_clipping_brings_the_norm_down(pool: RankPool, world: int) -> None:
    expected = norm_of_one_process()
    for whole, norm in pool.run(f"{JOBS}:clipped", world, max_norm=0.5):
        assert norm == pytest.approx(0.5 * expected / (expected + 1e-6), rel=1e-13)
        for gradient, before in zip(whole, whole_gradients().values(), strict=True):
            torch.testing.assert_close(gradient, before * (0.5 / (expected + 1e-6)), rtol=1e-13, atol=0)


def test_a_short_gradient_is_left_alone(pool: RankPool) -> None:
    for whole, _ in pool.run(f"{JOBS}:clipped", 2, max_norm=1e3):
        assert all(torch.equal(a, b) for a, b in zip(whole, whole_gradients().values(), strict=True))


@pytest.mark.parametrize(("norm", "scale"), [(0.0, 1.0), (0.5, 1.0), (2.0, 1 / 2.000001), (1e8, 1 / (1e8 + 1e-6))])
def test_the_scale_is_torchs(norm: float, scale: float) -> None:
    seen = clip_scale(torch.tensor(norm, dtype=torch.float64), 1.0)
    assert seen.item() == pytest.approx(scale, rel=1e-15)
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parameter.grad = torch.tensor([norm], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    assert parameter.grad.item() == pytest.approx(norm * seen.item(), rel=1e-12)


def test_gradients_keep_their_dtype_and_place(pool: RankPool) -> None:
    assert pool.run(f"{JOBS}:scaled_in_place", 1) == [([0.25] * 3, torch.float32, True)]


CLIPS: list[list[Clip]] = [
    [ClipNorm(limit=0.5, p=p, over=over) for _ in range(5)] for p in (1.0, 2.0, 3.0, "inf") for over in ("group", "all")
]
MIXED: list[Clip] = [
    ClipNorm(limit=0.5, p="inf"),
    ClipNorm(limit=0.3, over="all", p=3),
    ClipValue(limit=0.4),
    NoClip(),
    ClipNorm(limit=1e3, over="all"),
]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("clips", [*CLIPS, [ClipValue(limit=0.4)] * 5, MIXED], ids=str)
def test_each_group_is_clipped_by_its_own_rule_as_in_one_process(pool: RankPool, clips: list[Clip], world: int) -> None:
    before = [0.5 * gradient for gradient in whole_gradients().values()]
    everything = torch.cat([gradient.flatten() for gradient in before])
    for norms, after in pool.run(f"{JOBS}:clipped_apart", world, clips=clips, unscale=0.5):
        torch.testing.assert_close(norms.groups, torch.stack([g.norm() for g in before]), rtol=1e-13, atol=0)
        assert norms.total.item() == pytest.approx(everything.norm().item(), rel=1e-13)
        assert norms.parameters.tolist() == [norms.groups[0], 0.0, *norms.groups[1:]]
        for index, (clip, gradient) in enumerate(zip(clips, before, strict=True)):
            scale, share, expected = 1.0, 0.0, gradient
            if isinstance(clip, ClipNorm):
                norm = (everything if clip.over == "all" else gradient.flatten()).norm(clip.order)
                scale = min(1.0, clip.limit / (norm.item() + 1e-6))
                expected, share = gradient * scale, float(scale < 1)
            elif isinstance(clip, ClipValue):
                expected = gradient.clamp(-clip.limit, clip.limit)
                without_gradient = 3 if index == 0 else 0
                share = (gradient.abs() > clip.limit).sum().item() / (gradient.numel() + without_gradient)
            torch.testing.assert_close(after[index], expected, rtol=1e-13, atol=0)
            assert norms.scales[index].item() == pytest.approx(scale, rel=1e-13)
            assert norms.shares[index].item() == pytest.approx(share, rel=1e-13)
