"""Rounding to bf16 by chance: right on average, and a function of seed, step, parameter, state and place alone."""

from __future__ import annotations

import math

import pytest
import torch

from disttrain.optim.stochastic_rounding import CHUNK, noise_bits, noise_key, round_to_bf16

KEY = noise_key(1, 2, "blocks.0.mlp.up.weight", "exp_avg")


@pytest.mark.parametrize("value", [1.0 + 1 / 512, -3.14159265, 1e-3 / 3, -1e30 / 7, 3e-39])
def test_the_mean_is_the_number(value: float) -> None:
    source = torch.full((200_000,), value)
    rounded = round_to_bf16(source, KEY, 0).double()
    low, high = rounded.min().item(), rounded.max().item()
    assert low <= source[0].item() <= high
    # Four standard errors of a choice between two neighbours.
    assert abs(rounded.mean().item() - source[0].item()) <= 4 * (high - low) / 2 / math.sqrt(source.numel())
    assert len(rounded.unique()) == 2
    neighbours = {source[:1].bfloat16().item()}
    assert neighbours <= {low, high}


def test_numbers_that_bf16_has_stay() -> None:
    source = torch.cat([torch.randn(10_000), torch.tensor([0.0, -0.0, 2.0**-133, 3.3895313892515355e38])])
    source = source.bfloat16().float()
    assert torch.equal(round_to_bf16(source, KEY, 0).float(), source)
    assert math.copysign(1, round_to_bf16(torch.tensor([-0.0]), KEY, 0).item()) == -1


def test_what_is_not_finite_stays_and_what_is_finite_remains_so() -> None:
    source = torch.tensor([math.inf, -math.inf, math.nan]).repeat(1000)
    rounded = round_to_bf16(source, KEY, 0).float()
    assert torch.equal(rounded.isnan(), source.isnan())
    assert torch.equal(rounded.nan_to_num(0, 1, -1), source.nan_to_num(0, 1, -1))
    largest = torch.full((10_000,), torch.finfo(torch.float32).max)
    for sign in (1, -1):
        assert round_to_bf16(sign * largest, KEY, 0).isfinite().all()


def test_each_part_of_the_key_changes_the_noise() -> None:
    others = [
        noise_key(2, 2, "blocks.0.mlp.up.weight", "exp_avg"),
        noise_key(1, 3, "blocks.0.mlp.up.weight", "exp_avg"),
        noise_key(1, 2, "blocks.1.mlp.up.weight", "exp_avg"),
        noise_key(1, 2, "blocks.0.mlp.up.weight", "exp_avg_sq"),
    ]
    mine = noise(0, KEY)
    assert abs(mine.mean().item() / 32767.5 - 1) < 0.01
    for theirs in (*(noise(0, other) for other in others), noise(1 << 33, KEY), noise(CHUNK, KEY)):
        assert abs(torch.corrcoef(torch.stack([mine, theirs]))[0, 1].item()) < 0.02
    assert abs(torch.corrcoef(torch.stack([mine[1:], mine[:-1]]))[0, 1].item()) < 0.02


def noise(start: int, key: int) -> torch.Tensor:
    return noise_bits(start, CHUNK, key, torch.device("cpu")).double()


def test_every_bit_of_the_noise_is_fair() -> None:
    bits = noise_bits(0, CHUNK, KEY, torch.device("cpu"))
    assert 0 <= bits.min() <= bits.max() <= 0xFFFF
    for bit in range(16):
        assert abs(((bits >> bit) & 1).double().mean().item() - 0.5) < 0.01


@pytest.mark.parametrize("cut", [1, 7, 500, 1999])
def test_a_shard_is_rounded_as_its_part_of_the_whole(cut: int) -> None:
    whole = torch.randn(2000, 3, dtype=torch.float64)
    parts = [round_to_bf16(whole[:cut], KEY, 0), round_to_bf16(whole[cut:], KEY, 3 * cut)]
    assert torch.equal(torch.cat(parts), round_to_bf16(whole, KEY, 0))
    assert round_to_bf16(whole[:0], KEY, 6000).shape == (0, 3)


def test_chunks_do_not_show() -> None:
    whole = torch.randn(2 * CHUNK + 5)
    for cut in (9, CHUNK - 1, CHUNK + 7, len(whole) - 9):
        assert torch.equal(round_to_bf16(whole, KEY, 0)[cut:], round_to_bf16(whole[cut:], KEY, cut))
