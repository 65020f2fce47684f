"""Stochastic rounding to bf16 whose noise depends on nothing but the element: not on layout, device or restart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Elements at a time: their bits stay in a core's cache. Divides 2^32, so no chunk has two upper halves of a place."""
_MASK = 0xFFFF_FFFF
_LARGEST = 0x7F7F_FFFF
"""The bits of fp32's largest finite number."""


def noise_key(seed: int, step: int, name: str, state: str) -> int:
    """64 bits for one state tensor of one parameter in one step."""
    text = f"{seed}/{step}/{name}/{state}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@torch.no_grad()
def round_to_bf16(source: Tensor, key: int, offset: int) -> Tensor:
    """A bf16 copy of `source`, each element rounded to one of its neighbours with an expectation of itself.

    `offset` is the place of the first element in the whole tensor, row by row: the shards of a tensor that is cut along
    its rows are rounded as the whole is. Numbers that are not finite stay what they are, and finite ones finite.
    """
    flat = source.detach().reshape(-1).float()
    rounded = torch.empty_like(flat, dtype=torch.bfloat16)
    start = 0
    while start < flat.numel():
        # Chunks begin where those of the whole tensor do.
        end = min(flat.numel(), start + CHUNK - (offset + start) % CHUNK)
        bits = flat[start:end].view(torch.int32)
        noise = noise_bits(offset + start, end - start, key, flat.device)
        # Away from zero with the odds of the sixteen bits that bf16 has no room for; without a carry beyond the largest
        # number, and none at all for what is not finite.
        room = (bits & 0x7FFF_FFFF).neg_().add_(_LARGEST).clamp_(min=0)
        torch.minimum(noise, room, out=noise)
        rounded[start:end] = noise.add_(bits).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
        start = end
    return rounded.reshape(source.shape)


def noise_bits(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """16 random bits (int32) for each of `count` places from `start` on, within one chunk.

    A 32-bit mixer over the place, with half of the key before and half of it in the middle: lowbias32 of Chris Wellons
    (public domain), without its last shift, which the upper bits do not need.
    """
    before, between = key & _MASK, (key >> 32) ^ (start >> 32) * 0x9E3779B9
    bits = torch.arange(count, dtype=torch.int32, device=device)
    bits.add_(_signed(start)).bitwise_xor_(_signed(before))
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D).bitwise_xor_(_signed(between))
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def _signed(value: int) -> int:
    """The int32 with the lower 32 bits of `value`."""
    value &= _MASK
    return value - (1 << 32) if value >> 31 else value
