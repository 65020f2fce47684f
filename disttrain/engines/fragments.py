"""Parameters that an engine has flattened and cut without regard to their rows, as parameters of our optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from disttrain.optim.sharding import Flat, flat, local


def fragment(run: Tensor, shape: torch.Size, first: int, mesh: DeviceMesh) -> nn.Parameter:
    """A parameter of the whole `shape` of whose elements this rank holds `run` [n], from the element `first` on.

    It shares the memory of `run`, has one dim, and counts as cut over all ranks of `mesh`.
    """
    parameter = nn.Parameter(_in_runs(run, shape.numel(), mesh))
    parameter.flat = Flat(tuple(shape), first)  # type: ignore[attr-defined]
    return parameter


def with_fragments(skeleton: nn.Module, fragments: Mapping[str, nn.Parameter]) -> nn.Module:
    """`skeleton`, a model on the meta device, with `fragments` for its parameters: their names, roles and groups."""
    named = dict(skeleton.named_parameters())
    by_identity = {id(parameter): fragments[name] for name, parameter in named.items()}
    for module in skeleton.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, by_identity[id(parameter)])
    return skeleton


def set_gradients(fragments: Iterable[nn.Parameter], gradients: Iterable[Tensor]) -> None:
    """This rank's run of each gradient; what is done to it is done in `gradients`."""
    for parameter, gradient in zip(fragments, gradients, strict=True):
        assert isinstance(parameter, DTensor)
        parameter.grad = _in_runs(gradient, parameter.numel(), parameter.device_mesh)


def dist_whole(run: Tensor, held: Flat) -> Tensor:
    """The whole tensor, of which this rank holds a `run`. Collective."""
    whole = torch.zeros(torch.Size(held.shape).numel(), dtype=run.dtype, device=run.device)
    whole[held.first : held.first + run.numel()] = run
    dist.all_reduce(whole)
    return whole.view(held.shape)


class RowState:
    """Runs as tensors that are cut along their rows, which checkpoints know. Collective.

    The tensors are copies; `write_back` takes what a load has written into them. One whole tensor exists at a time.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._pairs: list[tuple[DTensor, Tensor, Flat]] = []

    def dist_rows(self, owner: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` of names as in checkpoints, where those of parameters of `owner` are runs."""
        runs = {name: run for name, parameter in owner.named_parameters() if (run := flat(parameter))}
        self._pairs = []
        return {name: self._as_rows(tensor, runs.get(_parameter(name))) for name, tensor in state.items()}

    @torch.no_grad()
    def dist_write_back(self) -> None:
        for rows, run, held in self._pairs:
            whole = rows.full_tensor().reshape(-1)
            run.copy_(whole[held.first : held.first + run.numel()])

    def forget(self) -> None:
        """Free the copies."""
        self._pairs = []

    @torch.no_grad()
    def _as_rows(self, tensor: Tensor, held: Flat | None) -> Tensor:
        if held is None or not isinstance(tensor, DTensor):
            return tensor
        whole = dist_whole(local(tensor), held)
        own = whole.chunk(self.mesh.size())[self.mesh.get_local_rank() :][:1]
        mine = own[0].clone() if own else whole[:0].clone()
        rows = DTensor.from_local(
            mine, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        self._pairs.append((rows, local(tensor), held))
        return rows


def _in_runs(run: Tensor, elements: int, mesh: DeviceMesh) -> DTensor:
    shape = torch.Size((elements,))
    return DTensor.from_local(run.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))


def _parameter(name: str) -> str:
    """Of `model.NAME` and `optim.NAME.KEY`."""
    kind, _, rest = name.partition(".")
    return rest if kind == "model" else rest.rpartition(".")[0]
