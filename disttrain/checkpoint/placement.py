"""Boxes in tensors and in files: none twice, none outside, nothing left over.

This file imports no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from operator import add, le
from reprlib import repr as shortened
from typing import Any

from disttrain.checkpoint.untrusted import text

Counts = tuple[int, ...]
Box = tuple[Counts, Counts]
"""Offsets and sizes."""
STORED_DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""Torch's names: the names in safetensors and the bytes of one element."""
_MOST_CUT_DIMS = 4


class Room:
    """The files while tensors are placed in them: no key twice, no more bytes than a file has."""

    def __init__(self, left: dict[str, int]) -> None:
        self.left = left
        self.names = {name: name for name in left}
        self.keys: set[tuple[str, str]] = set()

    def take(self, name: str, file: Any, key: Any, nbytes: int) -> tuple[str, str]:
        if file not in self.left:
            raise ValueError(f"{name}: {shortened(file)} is not one of the checkpoint's files")
        place = (self.names[file], text(key))
        if nbytes == 0 or place in self.keys:
            raise ValueError(f"{name}: region {key} of {file} {'appears twice' if nbytes else 'is empty'}")
        self.keys.add(place)
        self.left[file] -= nbytes
        if self.left[file] < 0:
            raise ValueError(f"{name}: {file} would need {-self.left[file]:,} bytes more than it has")
        return place


def inside(offsets: Counts, sizes: Counts, shape: Counts) -> bool:
    """Whether a box lies in `shape`."""
    return len(offsets) == len(sizes) == len(shape) and all(map(le, map(add, offsets, sizes), shape))


def tiles(boxes: Sequence[Box], shape: Counts) -> bool:
    """Whether boxes inside `shape` that have its volume together tile it, in time linear in their number.

    A sum of boxes is known by its corners with alternating signs: those of a tiling cancel, but for the outermost.
    """
    cut = [axis for axis, length in enumerate(shape) if any(sizes[axis] != length for _, sizes in boxes)]
    if len(cut) > _MOST_CUT_DIMS:
        raise ValueError(f"shape {shape} is cut along {len(cut)} dims, at most {_MOST_CUT_DIMS} are read")
    signs = [math.prod(sign) for sign in product((1, -1), repeat=len(cut))]
    corners: dict[Counts, int] = defaultdict(int)
    for offsets, sizes in boxes:
        edges = [(offsets[axis], offsets[axis] + sizes[axis]) for axis in cut]
        for corner, sign in zip(product(*edges), signs, strict=True):
            corners[corner] += sign
    for corner, sign in zip(product(*((0, shape[axis]) for axis in cut)), signs, strict=True):
        corners[corner] -= sign
    return not boxes or not any(corners.values())
