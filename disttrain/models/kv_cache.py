"""Keys and values that generation keeps, for a batch of prompts of different lengths."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class LayerCache:
    """Keys and values [batch, kv_heads, length, head_dim] of one attention layer, after norms and rotation."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Everything kept so far with the new columns behind it. The copy costs what attention's own reading costs."""
        if self.kept is not None:
            keys, values = torch.cat((self.kept[0], keys), dim=2), torch.cat((self.kept[1], values), dim=2)
        self.kept = keys, values
        return keys, values


class KVCache:
    """What a model has seen of a batch of rows that end together: row i begins behind `padding[i]` columns of anything.

    Neither a dataclass nor a container: FSDP2 and DDP rebuild those among a module's arguments, and what a forward
    adds to the copy would be lost.
    """

    def __init__(self, padding: Tensor) -> None:
        self.padding = padding[:, None]
        self.length = 0
        self.layers: defaultdict[int, LayerCache] = defaultdict(LayerCache)

    def append(self, count: int) -> tuple[Tensor, Tensor]:
        """Positions [batch, count] of `count` more columns, and which columns each sees: [batch, 1, count, length]."""
        columns = torch.arange(self.length + count, device=self.padding.device)
        new = columns[self.length :]
        self.length += count
        causal, itself = new[:, None] >= columns, new[:, None] == columns
        # Padding sees itself: a softmax over no column is 0 / 0, which attention kernels need not turn into zero.
        visible = causal & ((columns >= self.padding)[:, None] | itself)
        return (new - self.padding).clamp(min=0), visible[:, None]
