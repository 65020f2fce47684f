"""Stochastic rounding to bf16 whose noise depends on nothing but the element: not on layout, device or restart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_CHUNK = 1 << 20
_MASK = 0xFFFF_FFFF
_LARGEST = 0x7F7F
"""The bits of bf16's largest finite number."""


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
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        places = torch.arange(offset + start, offset + start + part.numel(), device=flat.device)
        rounded[start : start + _CHUNK] = _round(part, noise_bits(places, key))
    return rounded.reshape(source.shape)


def noise_bits(places: Tensor, key: int) -> Tensor:
    """16 random bits for each place (int64): two rounds of a 32-bit mixer over place and key, as int64."""
    low = _mix((places & _MASK) ^ (key & _MASK))
    return _mix((low + (places >> 32) + (key >> 32)) & _MASK) >> 16


def _mix(bits: Tensor) -> Tensor:
    """Chris Wellons' lowbias32 (public domain): every input bit moves every output bit with odds near one half."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D) & _MASK
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & _MASK
    return bits ^ (bits >> 16)


def _round(values: Tensor, noise: Tensor) -> Tensor:
    """Away from zero with the odds of the sixteen bits that bf16 has no room for."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFF_FFFF
    upper = (magnitude + noise.to(torch.int32)) >> 16
    finite = magnitude < 0x7F80_0000
    upper = torch.where(finite, upper.clamp(max=_LARGEST), upper)
    signed = torch.where(bits < 0, upper - 0x8000, upper).to(torch.int16)
    return torch.where(finite, signed.view(torch.bfloat16), values.bfloat16())
