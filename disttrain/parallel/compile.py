"""torch.compile, one block at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def apply_compile(blocks: Sequence[nn.Module]) -> None:
    """Compile each block: equal blocks share one compilation, and a graph never spans a unit's gathering.

    Only `forward` is compiled: the hooks of activation checkpointing and FSDP2 around it are no graph.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)
