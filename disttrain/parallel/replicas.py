"""Which ranks hold the same weights, and a sum over their bits that tells when one of them no longer does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.config import ParallelDims
from disttrain.config.parallel import ParallelConfig

_ROW = 1024
"""Numbers of eight bytes that are added up without regard to their order, as fast as memory is read."""
_FACTORS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""Odd, with bits all over."""


def weight_sums(parameters: Iterable[Tensor]) -> Tensor:
    """For each of the `parameters` one int64 of what this rank holds of it, from all its bits and their places.

    Any single flipped bit changes it, and so do, but for chance, more of them in different rows of 8 KiB; within one
    such row, whose numbers are added up modulo 2**64, two may cancel. It costs one pass over the memory.
    """
    return torch.stack([_bits_sum(p.to_local() if isinstance(p, DTensor) else p) for p in parameters])


def total_sum(sums: Tensor) -> Tensor:
    """One number of all parameters' `sums`, in which their order counts."""
    return _mixed(sums).sum()


def _bits_sum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    if (flat.storage_offset() * flat.element_size()) % 8:
        flat = flat.clone()
    each = 8 // flat.element_size()
    row = _ROW * each
    whole = flat.numel() - flat.numel() % row
    rows = flat[:whole].view(torch.int64).view(-1, _ROW).sum(1)
    rest = flat.new_zeros(row)
    rest[: flat.numel() - whole] = flat[whole:]
    return _mixed(torch.cat([rows, rest.view(torch.int64).sum().reshape(1)])).sum()


def _mixed(numbers: Tensor) -> Tensor:
    """Numbers [n] that differ in one bit, or in their place, become ones that differ in about half of theirs."""
    places = torch.arange(1, numbers.numel() + 1, device=numbers.device)
    mixed = (numbers + places * _FACTORS[0]) * _FACTORS[1]
    for factor in _FACTORS:
        mixed = (mixed ^ (mixed >> 29)) * factor
    return mixed ^ (mixed >> 32)


def held_within_steps(config: ParallelConfig) -> bool:
    """Whether ranks have copies of whole weights only from a step's forward to its backward: zero1 and zero2."""
    return config.strategy in ("zero1", "zero2")


def replica_groups(config: ParallelConfig, dims: ParallelDims) -> list[list[int]]:
    """The ranks that hold the same numbers, where there are two or more of them. fsdp has none."""
    if held_within_steps(config):
        groups = [list(range(dims.dp_replicate * dims.dp_shard))]
    else:
        ranks = range(dims.dp_replicate)
        groups = [[copy * dims.dp_shard + shard for copy in ranks] for shard in range(dims.dp_shard)]
    return [group for group in groups if len(group) > 1]


def odd_ones(sums: Sequence[int], groups: Iterable[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Of `sums` by rank: the ranks that a majority of their group outvotes, and those of groups without a majority."""
    outvoted, undecided = [], []
    for group in groups:
        (most, count), *others = Counter(sums[rank] for rank in group).most_common()
        if not others:
            continue
        if 2 * count > len(group):
            outvoted += [rank for rank in group if sums[rank] != most]
        else:
            undecided += list(group)
    return sorted(outvoted), sorted(undecided)
