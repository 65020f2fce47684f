"""The model's parallel plan as data: what the mechanisms above may cut, and which parameters belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn


@dataclass(frozen=True)
class ShardingPlan:
    """Patterns over module and parameter names (`fnmatch`: a star also spans dots)."""

    fsdp_units: tuple[str, ...]
    """Modules that are gathered and freed as one, in forward order; what is left over belongs to the root unit."""
    roles: Mapping[str, str]
    """What parameters are, as regular expressions looked for in their names; groups name them as `role:NAME`."""
    residual_outputs: tuple[str, ...]
    """Weights that write into the residual stream."""
    layer: str | None = None
    """A regular expression that finds a parameter's layer: the number that it captures."""

    def units(self, model: nn.Module) -> Iterator[nn.Module]:
        for name, module in model.named_modules():
            if any(fnmatchcase(name, pattern) and name.count(".") == pattern.count(".") for pattern in self.fsdp_units):
                yield module


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


GPT_PLAN = ShardingPlan(
    fsdp_units=("blocks.*",),
    roles={
        "embeddings": r"^(wte|wpe)\.",
        "head": r"^head\.",
        "norms": r"norm\.",
        "biases": r"\.bias$",
        "matrices": r"^blocks\..*(wq|wk|wv|wo|up|down|gate)\.weight$",
        "attention_qk": r"\.attention\.(wq|wk)\.weight$",
        "attention_vo": r"\.attention\.(wv|wo)\.weight$",
        "mlp": r"\.mlp\..*\.weight$",
    },
    residual_outputs=("*.attention.wo.weight", "*.mlp.down.weight"),
    layer=r"^blocks\.(\d+)\.",
)
