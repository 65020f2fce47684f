"""What this rank has to write: planned once, and copied to host memory so that training can go on meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from disttrain.checkpoint.dcp_io import PlanRecorder, dcp_errors, quiet_dcp
from disttrain.checkpoint.manifest import TensorEntry
from disttrain.checkpoint.tensor_file import Box


@dataclass(frozen=True)
class Staged:
    """This rank's boxes for `file`; `tensors`, on rank 0, is the manifest's table of everybody's."""

    file: str
    boxes: tuple[Box, ...]
    tensors: dict[str, TensorEntry]


class Staging:
    """Asks torch's planner who writes what, as long as the state's names, shapes and dtypes stay the same only once."""

    def __init__(self, copy: bool) -> None:
        self._host = HostCopy() if copy else None
        self._planner = DefaultSavePlanner(flatten_state_dict=False)
        self._plan: PlanRecorder | None = None
        self._signature: list[tuple[str, torch.Size, torch.dtype]] = []

    def stage(self, state: Mapping[str, Tensor]) -> Staged:
        """Collective when it has to plan. With `copy` the boxes hold what `state` holds now, else `state` itself.

        Raises UserError when something in `state` cannot be stored.
        """
        plan = self._planned(state)
        self._planner.set_up_planner(dict(state), None, is_coordinator=False)
        tensors = {key: self._tensor(item) for key, item in plan.items.items()}
        if self._host is not None:
            tensors = self._host.copy(tensors)
        return Staged(plan.file, tuple(Box.of(key, tensor) for key, tensor in tensors.items()), plan.tensors)

    def _tensor(self, item: WriteItem) -> Tensor:
        data = self._planner.resolve_data(item)
        assert isinstance(data, Tensor)  # the plan holds nothing else
        return data.detach()

    def _planned(self, state: Mapping[str, Tensor]) -> PlanRecorder:
        signature = [(n, t.shape, t.dtype) for n, t in state.items() if isinstance(t, Tensor)]
        if self._plan is not None and signature == self._signature and len(signature) == len(state):
            return self._plan
        plan = PlanRecorder()
        with dcp_errors(), quiet_dcp():
            dcp.save(dict(state), storage_writer=plan, planner=self._planner, no_dist=not dist.is_initialized())
        self._plan, self._signature = plan, signature
        return plan


class HostCopy:
    """Buffers that live from save to save: fresh memory costs more than the copy, and pinned memory far more."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors in host memory; the last copy's content is overwritten."""
        self._buffers = {key: self._buffer(key, tensor) for key, tensor in tensors.items()}
        for key, tensor in tensors.items():
            self._buffers[key].copy_(tensor, non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return self._buffers

    def _buffer(self, key: str, tensor: Tensor) -> Tensor:
        held = self._buffers.get(key)
        if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
            return held
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
