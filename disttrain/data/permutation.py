"""Pseudo-random permutations that are computed and not stored."""

from __future__ import annotations

import hashlib
import json
from typing import TypeVar

import numpy as np

Words = TypeVar("Words", int, np.ndarray)

MASK_64 = 0xFFFF_FFFF_FFFF_FFFF
GOLDEN_64 = 0x9E37_79B9_7F4A_7C15
ROUNDS = 8


def derive_key(*parts: int | str) -> int:
    """A 64-bit key that depends on every part, its type and its place."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permute(index: Words, n: int, key: int) -> Words:
    """Where the permutation `key` of range(n) sends `index`, an int or an integer array of any shape.

    A Feistel network permutes the enclosing power of four; a result that falls outside range(n) is sent
    through it again until it lands inside, which keeps the map one to one (cycle-walking). Indices must
    lie in range(n), and n in 1..2**50; ints and arrays agree.
    """
    if not isinstance(index, np.ndarray):
        return _walk(index, n, key)
    result = index.astype(np.uint64).ravel()
    outside = np.arange(result.size)
    while outside.size:
        result[outside] = _feistel(result[outside], _half_bits(n), key)
        outside = outside[result[outside] >= n]
    return result.reshape(index.shape).astype(index.dtype)


def _walk(index: int, n: int, key: int) -> int:
    result = _feistel(int(index), _half_bits(n), key)
    while result >= n:
        result = _feistel(result, _half_bits(n), key)
    return result


def _half_bits(n: int) -> int:
    return max(1, ((n - 1).bit_length() + 1) // 2)


def _feistel(x: Words, half_bits: int, key: int) -> Words:
    """One pass over range(4**half_bits), for Python ints and for uint64 arrays alike."""
    mask = (1 << half_bits) - 1
    left, right = x >> half_bits, x & mask
    for number in range(ROUNDS):
        subkey = (key + number * GOLDEN_64) & MASK_64
        left, right = right, left ^ (_mix((right + subkey) & MASK_64) & mask)
    return (left << half_bits) | right


def _mix(x: Words) -> Words:
    """The finalizer of splitmix64; the masks are for Python ints, which do not wrap."""
    x = ((x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB) & MASK_64
    return x ^ (x >> 31)
