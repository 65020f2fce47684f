"""How a parameter lies over processes: the grid of copies and shards, and who holds which region."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

# Torch has no public way to ask for the region of another rank.
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from disttrain.errors import UserError
from disttrain.optim.matrix_plan import Box


@dataclass(frozen=True)
class Layout:
    """The grid of global ranks [replica][shard] that holds a parameter, this process's place in it, and its groups."""

    grid: tuple[tuple[int, ...], ...]
    replica: int
    shard: int
    coordinates: tuple[tuple[int, ...], ...]
    """On the parameter's mesh, of this copy's shards; empty for plain tensors."""
    device: torch.device
    """Where matrices travel and are computed: gradients may be offloaded to the host."""
    shard_group: ProcessGroup | None
    """The other shards of this copy, in the order of the grid's row; None where there is one shard."""
    replica_group: ProcessGroup | None
    """The other copies of this shard, in the order of the grid's column; None where there is one copy."""

    @property
    def shards(self) -> int:
        return len(self.grid[0])

    @property
    def replicas(self) -> int:
        return len(self.grid)

    def owned(
        self, tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, copy: int | None, shard: int
    ) -> Tensor:
        """State that only the owner holds (its `tensor`; None elsewhere), as every process sees it.

        A DTensor on the mesh of its owners alone, so that a checkpoint stores it once and a load finds it anywhere.
        """
        ranks = [row[shard] for index, row in enumerate(self.grid) if copy in (None, index)]
        if len(ranks) == self.shards * self.replicas:
            assert tensor is not None
            return tensor
        held = torch.empty(0, dtype=dtype, device=self.device) if tensor is None else tensor
        mesh = DeviceMesh(self.device.type, ranks, _init_backend=False)
        stride = torch.empty(shape, device="meta").stride()
        # Not from_local, which takes the empty shape of a scalar for no shape at all.
        spec = DTensorSpec(mesh, (Replicate(),), tensor_meta=TensorMeta(shape, stride, dtype))
        return DTensor(held, spec, requires_grad=False)


def layout_key(parameter: Tensor) -> object:
    """Parameters with equal keys share a layout."""
    if not isinstance(parameter, DTensor):
        return parameter.device
    return parameter.device_mesh, tuple(placement.is_replicate() for placement in parameter.placements)


def layout_of(parameter: Tensor) -> Layout:
    """A plain tensor is taken to be equal on all processes, as DDP over all of them leaves it.

    Collective where a parameter is cut along several axes of its mesh: their group may have to be made. Raises
    UserError for meshes on which matrices cannot travel.
    """
    if isinstance(parameter, DTensor):
        return _layout_on_mesh(parameter)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Layout(((0,),), 0, 0, (), parameter.device, None, None)
    column = tuple((rank,) for rank in range(dist.get_world_size()))
    return Layout(column, dist.get_rank(), 0, (), parameter.device, None, dist.group.WORLD)


def regions_of(parameter: Tensor, layout: Layout) -> tuple[Box, ...]:
    """What each shard holds of a matrix, in the order of the grid's rows; boxes of the whole parameter."""
    rows, columns = parameter.shape
    if not isinstance(parameter, DTensor):
        return (Box((0, 0), (rows, columns)),)
    mesh, boxes = parameter.device_mesh, []
    for coordinate in layout.coordinates:
        sizes, offsets = _compute_local_shape_and_global_offset(
            parameter.shape, mesh.shape, list(coordinate), parameter.placements
        )
        size = (sizes[0], sizes[1])
        boxes.append(Box((offsets[0], offsets[1]) if 0 not in size else (0, 0), size))
    return tuple(boxes)


def _layout_on_mesh(parameter: DTensor) -> Layout:
    mesh = parameter.device_mesh
    copied = [axis for axis, placement in enumerate(parameter.placements) if placement.is_replicate()]
    cut = [axis for axis in range(mesh.ndim) if axis not in copied]
    count = 1
    for axis in copied:
        count *= mesh.size(axis)
    ranks = mesh.mesh.permute(*copied, *cut).reshape(count, -1)
    rank = dist.get_rank()
    replica, shard = (int(index) for index in (ranks == rank).nonzero()[0])
    row, column = _group(mesh, cut), _group(mesh, copied)
    for group, expected in ((row, ranks[replica]), (column, ranks[:, shard])):
        # Sends are addressed by the group's own order.
        if group is not None and dist.get_process_group_ranks(group) != expected.tolist():
            raise UserError(
                f"matrices cannot travel on a mesh whose ranks do not rise along its axes: {mesh.mesh.tolist()}; "
                "build it with init_device_mesh"
            )
    coordinates = tuple(tuple((mesh.mesh == peer).nonzero()[0].tolist()) for peer in ranks[replica])
    kind = mesh.device_type
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    return Layout(tuple(map(tuple, ranks.tolist())), replica, shard, coordinates, device, row, column)


def _group(mesh: DeviceMesh, axes: list[int]) -> ProcessGroup | None:
    sizes = [axis for axis in axes if mesh.size(axis) > 1]
    if not sizes:
        return None
    if len(sizes) == 1:
        return mesh.get_group(sizes[0])
    names = mesh.mesh_dim_names
    if names is None:
        raise UserError("matrices are cut along several axes of a mesh without names: build it with mesh_dim_names")
    if len(sizes) == mesh.ndim:
        return mesh._flatten().get_group()
    return mesh[tuple(names[axis] for axis in sizes)]._flatten().get_group()
