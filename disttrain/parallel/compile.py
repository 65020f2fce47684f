"""torch.compile, one block at a time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch
from torch import nn

from disttrain.errors import UserError


def apply_compile(blocks: Sequence[nn.Module]) -> None:
    """Compile each block in place: equal blocks share one compilation, and a graph never spans a unit's gathering.

    UserError where inductor has no compiler to call.
    """
    if not torch.cuda.is_available() and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError(
            "parallel.compile = true: torch.compile needs a C++ compiler on the CPU, and neither g++ nor clang++ is "
            "on PATH; install one or set parallel.compile=false"
        )
    for block in blocks:
        block.compile(fullgraph=True)
