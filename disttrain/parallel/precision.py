"""Computing in a narrower type than the weights are kept in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""None: whatever type the weights have, so that fp64 tests stay in fp64."""


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
