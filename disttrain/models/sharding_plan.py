"""The model's parallel plan as data: what the mechanisms above may cut, and which parameters belong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn


@dataclass(frozen=True)
class ShardingPlan:
    """Patterns over module and parameter names (`fnmatch`: a star also spans dots)."""

    fsdp_units: tuple[str, ...]
    """Modules that are gathered and freed as one, in forward order; what is left over belongs to the root unit."""
    no_decay: tuple[str, ...]
    """Parameters that weight decay leaves alone."""
    residual_outputs: tuple[str, ...]
    """Weights that write into the residual stream."""

    def units(self, model: nn.Module) -> Iterator[nn.Module]:
        for name, module in model.named_modules():
            if any(fnmatchcase(name, pattern) and name.count(".") == pattern.count(".") for pattern in self.fsdp_units):
                yield module


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


GPT_PLAN = ShardingPlan(
    fsdp_units=("blocks.*",),
    no_decay=("wte.*", "wpe.*", "*norm.*", "*.bias"),
    residual_outputs=("*.attention.wo.weight", "*.mlp.down.weight"),
)
