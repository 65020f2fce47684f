"""Parameters that DeepSpeed keeps on a disk between their uses: what its bookkeeping needs of us around a forward."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from disttrain.errors import UserError


def let_go(optimizer: Any) -> None:
    """Cut what a forward has left whole, and drop what was read ahead of a use that has not come.

    Of both DeepSpeed believes that they hold the newest weights, which is not so behind a change of these.
    """
    optimizer._partition_all_parameters()
    parameters = [parameter for part in optimizer.fp16_groups for parameter in part]
    swapper = parameters[0].nvme_swapper
    if swapper is None:
        return
    swapper.synchronize_reads()
    held = [p.ds_tensor for p in parameters]
    read = [t.final_location == "nvme" and t.status.name == "AVAILABLE" for t in held]
    swapper.remove_partition_and_release_buffers([p for p, there in zip(parameters, read, strict=True) if there])


def write_parameters_as_they_are() -> None:
    """DeepSpeed takes all parameters for bf16 where a device has no fp16, and would round others on their way."""
    from deepspeed.runtime.zero.partition_parameters import Init

    def set_dtype(init: Any, ds_config: Any, dtype: torch.dtype) -> None:
        init.dtype = dtype

    Init._set_dtype = set_dtype


def look_after_disk(model: nn.Module, optimizer: Any) -> None:
    """A forward without a backward would leave the buffers full of what the backward would have used."""
    parameter: Any = next(model.parameters())
    if parameter.nvme_swapper.dtype != parameter.dtype:
        raise RuntimeError(f"DeepSpeed would write {parameter.dtype} to a disk in {parameter.nvme_swapper.dtype}")

    def after_forward(*_: Any) -> None:
        if not torch.is_grad_enabled():
            let_go(optimizer)

    model.register_forward_hook(after_forward)


def check_buffers(sizes: Sequence[int], world: int, element_bytes: int, zero: dict[str, Any]) -> None:
    """UserError where DeepSpeed's buffers hold too little or cannot be locked in memory, which it does not survive.

    `sizes` are the elements of the parameters, `zero` is the section zero_optimization.
    """
    offload, parts = zero["offload_param"], [-(-size // world) for size in sizes]
    count, size = offload["buffer_count"], offload["buffer_size"]
    if size < max(parts):
        raise UserError(
            f"deepspeed.config_file: offload_param.buffer_size = {size:,}, and the largest parameter has "
            f"{max(parts):,} elements in each of {world} processes: take it out there"
        )
    staging = min(sum(parts), zero["sub_group_size"] + max(parts))
    needed = element_bytes * (count * size + staging)
    if not _can_lock(needed):
        raise UserError(
            f"deepspeed.offload_parameters = 'nvme': DeepSpeed locks {needed / 2**20:,.0f} MiB of each process's "
            f"memory ({count} buffers of {size:,} elements, and {staging:,} on their way to the disk, {element_bytes} "
            "bytes each), more than the system allows: raise `ulimit -l`, or lower sub_group_size or "
            "offload_param.buffer_count in deepspeed.config_file"
        )


def _can_lock(size: int) -> bool:
    with mmap.mmap(-1, size) as memory:
        start = ctypes.c_char.from_buffer(memory)
        refused = ctypes.CDLL(None).mlock(ctypes.byref(start), ctypes.c_size_t(size))
        del start
    return not refused
