"""Computing in a narrower type than the weights are kept in."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from disttrain.config.parallel import ParallelConfig

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""None: whatever type the weights have, so that fp64 tests stay in fp64."""

SLOWER = 1.2
"""From which ratio to fp32 on a narrow type is called slow."""


def device_notes(config: ParallelConfig, device: torch.device) -> list[str]:
    """What a user should know of settings that do not pay on this device."""
    if device.type != "cpu":
        return []
    notes = []
    if config.cpu_offload:
        notes.append("parallel.cpu_offload does nothing here: on a CPU run everything is in host memory already")
    if dtype := DTYPES[config.param_dtype]:
        ratio = _product_seconds(dtype) / _product_seconds(torch.float32)
        if ratio > SLOWER:
            how_much = f"a matrix product takes {ratio:.1f} times as long"
            notes.append(f"{config.param_dtype} is slower than fp32 on this CPU, which has no units for it: {how_much}")
    return notes


def _product_seconds(dtype: torch.dtype, size: int = 256, repeats: int = 5) -> float:
    """The best of a few products, the first of which only warms up."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


class CastParameters(nn.Module):
    """Calls `module` with all its parameters cast to `dtype`; gradients arrive in the parameters' own type.

    The arithmetic of FSDP2's mixed precision, for strategies that leave parameters whole and for references.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *args: Any) -> Tensor:
        cast = {name: parameter.to(self.dtype) for name, parameter in self.module.named_parameters()}
        return functional_call(self.module, cast, args)
