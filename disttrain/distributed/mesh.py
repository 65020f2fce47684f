"""The device mesh, from its arithmetic."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from disttrain.config import ParallelDims


def build_mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """A mesh with the named axes (dp_replicate, dp_shard) over all processes, slowest links outermost."""
    return init_device_mesh(
        device_type, (dims.dp_replicate, dims.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
