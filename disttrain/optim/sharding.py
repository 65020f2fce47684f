"""What an optimizer must know of a parameter's layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Flat:
    """Of a parameter that ranks hold as runs of its elements, which need not end where its rows do."""

    shape: tuple[int, ...]
    """Of the whole."""
    first: int
    """The element that this rank's run begins with."""


def flat(parameter: Tensor) -> Flat | None:
    """How `parameter`, with one dim, is held in runs; None where it is whole or cut along its rows."""
    return getattr(parameter, "flat", None)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`: the shard of a DTensor, sharing its memory, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def world_size() -> int:
    """Processes that there are; one where no group was made."""
    return dist.get_world_size() if dist.is_initialized() else 1


def copies(tensor: Tensor, world: int) -> int:
    """How many ranks hold the numbers that this rank holds of `tensor`."""
    if not isinstance(tensor, DTensor):
        return world
    mesh = tensor.device_mesh
    held = world // mesh.size()
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            held *= mesh.size(axis)
    return held


def like_sharded(held: Tensor, parameter: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of the whole `shape` cut along dim 0 as `parameter` is, of which this rank holds `held`."""
    if not isinstance(parameter, DTensor):
        return held
    stride = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=shape, stride=tuple(stride))


def first_element(parameter: Tensor) -> int:
    """Where this rank's rows of `parameter` begin in the whole tensor, counted in elements."""
    if run := flat(parameter):
        return run.first
    if not isinstance(parameter, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offsets[0] * parameter.shape[1:].numel()
