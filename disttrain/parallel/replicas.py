"""Which ranks hold the same weights, and a sum over their bits that tells when one of them no longer does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.config import ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.parallel.grad_sync import SyncRules


def weight_sums(parameters: Iterable[Tensor]) -> Tensor:
    """For each of the `parameters` what this rank holds of it as one int64: its bits, eight bytes at a time, added up
    modulo 2**64. Any single flipped bit changes it; it costs one pass over the memory."""
    return torch.stack([_bits_sum(p.to_local() if isinstance(p, DTensor) else p) for p in parameters])


def _bits_sum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    each = 8 // flat.element_size()
    whole = flat.numel() - flat.numel() % each
    if (flat.storage_offset() * flat.element_size()) % 8:
        flat = flat.clone()
    total = flat[:whole].view(torch.int64).sum()
    if whole == flat.numel():
        return total
    rest = flat.new_zeros(each)
    rest[: flat.numel() - whole] = flat[whole:]
    return total + rest.view(torch.int64).sum()


def held_within_steps(config: ParallelConfig) -> bool:
    """Whether ranks have copies of whole weights only from a step's forward to its backward: zero1 and zero2."""
    return config.strategy in ("zero1", "zero2") and not SyncRules.of(config).reshard_after_forward


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
