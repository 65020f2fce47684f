"""Small collectives over all processes. Sums and gathers only: an average hides how much each rank had."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def dist_sum_integers(*values: int) -> list[int]:
    """Each value summed over all ranks, exactly, in one all-reduce of CPU tensors (no device has to wait)."""
    return dist_begin_sum_integers(*values)()


def dist_begin_sum_integers(*values: int) -> Callable[[], list[int]]:
    """The same beside whatever follows: what it gives waits for the sums, and may be called again."""
    total = torch.tensor(values, dtype=torch.int64)
    work = dist.all_reduce(total, async_op=True)
    assert work is not None

    def sums() -> list[int]:
        work.wait()
        return total.tolist()

    return sums


def dist_all_gather_rows(row: Tensor) -> Tensor:
    """The `row` [n] of every rank as [world, n], in one collective."""
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)
