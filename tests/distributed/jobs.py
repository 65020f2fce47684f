"""What the rank pool runs for processes and meshes."""

import torch
import torch.distributed as dist

from disttrain.config import ParallelDims
from disttrain.distributed.collectives import dist_all_gather_rows, dist_sum_integers
from disttrain.distributed.mesh import build_mesh


def mesh_axes(rank: int, world: int, replicate: int, shard: int) -> dict[str, list[int]]:
    """The ranks of this rank's group along each axis."""
    mesh = build_mesh(ParallelDims(replicate, shard), "cpu")
    names = mesh.mesh_dim_names
    assert names is not None
    return {name: dist.get_process_group_ranks(mesh[name].get_group()) for name in names}


def sums(rank: int, world: int) -> list[int]:
    return dist_sum_integers(2**53 + 1 + rank, -(2**60), rank, 0)


def rows(rank: int, world: int) -> torch.Tensor:
    return dist_all_gather_rows(torch.tensor([rank, rank / 3], dtype=torch.float64))
