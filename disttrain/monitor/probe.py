"""How fast a device is: the same small piece of work on every rank, which waits for nobody."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

import torch

_SIZE = 4096
_TIMES = 16


class DeviceProbe:
    """A rank's own work on a GPU cannot be told from what its kernels wait for: this is done in its place."""

    def __init__(self, device: torch.device) -> None:
        self._factor = torch.ones(_SIZE, _SIZE, device=device, dtype=torch.bfloat16)
        self._product = torch.empty_like(self._factor)

    def seconds(self) -> float:
        """Of a matrix product, the median of 16, some milliseconds together. Waits for the device."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(_TIMES + 1)]
        torch.mm(self._factor, self._factor, out=self._product)  # it may have been idle, and slow to wake
        for index, mark in enumerate(marks):
            mark.record()
            if index < _TIMES:
                torch.mm(self._factor, self._factor, out=self._product)
        torch.cuda.synchronize(self._factor.device)
        return median(before.elapsed_time(after) for before, after in pairwise(marks)) / 1e3


def build_probe(device: torch.device) -> DeviceProbe | None:
    """None on a CPU, whose clock knows a rank's own work."""
    return DeviceProbe(device) if device.type == "cuda" else None
