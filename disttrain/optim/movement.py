"""Whether every trainable parameter has moved: one that has not is most often a mistake in the groups or the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.optim.sharding import local


class MovementCheck:
    """Made before a step from the parameters that are trained; two numbers of each shard stand for its elements."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self._before = self._fingerprints()

    def dist_unmoved(self) -> list[str]:
        """The names of those that no rank has seen change since. Collective: one all-reduce."""
        moved = (self._fingerprints() != self._before).any(dim=1).to(torch.int32)
        dist.all_reduce(moved)
        return [name for name, ranks in zip(self.parameters, moved.tolist(), strict=True) if ranks == 0]

    @torch.no_grad()
    def _fingerprints(self) -> Tensor:
        """[parameters, 2]: the sum, which a change of sign moves, and the norm, which changes that cancel out move."""
        shards = [local(parameter) for parameter in self.parameters.values()]
        pairs = [(t.sum(dtype=torch.float64), torch.linalg.vector_norm(t, dtype=torch.float64)) for t in shards]
        return torch.stack([torch.stack(pair) for pair in pairs])
