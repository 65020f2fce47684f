"""Small collectives over all processes. Sums and gathers only: an average hides how much each rank had."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def dist_sum_integers(*values: int) -> list[int]:
    """Each value summed over all ranks, exactly, in one all-reduce of CPU tensors (no device has to wait)."""
    total = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(total)
    return total.tolist()


def dist_all_gather_rows(row: Tensor) -> Tensor:
    """The `row` [n] of every rank as [world, n], in one collective."""
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)
