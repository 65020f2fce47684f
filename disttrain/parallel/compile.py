"""torch.compile, one block at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def apply_compile(blocks: Sequence[nn.Module]) -> None:
    """Compile each block in place: equal blocks share one compilation, and a graph never spans a unit's gathering."""
    for block in blocks:
        block.compile(fullgraph=True)
