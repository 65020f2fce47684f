"""The squared norms of gradients before they are summed over ranks, which sharding leaves no other place to see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.config import ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.parallel.grad_sync import SyncRules


def is_blind(parallel: ParallelConfig, dims: ParallelDims) -> bool:
    """Copies of the model that are not sharded themselves have no reduce-scatter for FSDP2 to show gradients in."""
    return parallel.strategy == "hsdp" and dims.dp_shard == 1


class NoiseProbe:
    """Adds up |g|^2 over the chunks of a step that it measures: a chunk is what one gradient on one rank is made of.

    Where gradients are reduced after every microbatch a chunk is a microbatch, else all microbatches of a rank. A rank
    alone has its microbatches: there the gradient that each of them adds is taken as a difference, for which the
    gradients are held twice in a step that is measured.
    """

    def __init__(self, parallel: ParallelConfig, dims: ParallelDims) -> None:
        self.alone, self.blind = dims.batch == 1, is_blind(parallel, dims)
        self.each = SyncRules.of(parallel).reduce_each or self.alone
        self.measuring = False
        self._before: list[Tensor] = []
        self._parts: list[Tensor] = []

    def begin(self, wanted: bool, tokens: Sequence[int]) -> list[int]:
        """At the start of a step of microbatches of so many `tokens`: those of this rank's chunks, none where nothing
        is measured. One microbatch on one rank would tell nothing."""
        self.measuring = wanted and not self.blind and not (self.alone and len(tokens) == 1)
        self._parts, self._before = [], []
        self._left = len(tokens)
        if not self.measuring:
            return []
        return list(tokens) if self.each else [sum(tokens)]

    def add(self, gradients: Tensor) -> None:
        """A piece of this rank's own gradient, on its way to the others."""
        if self.measuring and not self.alone:
            dtype = torch.promote_types(gradients.dtype, torch.float32)
            self._parts.append(torch.linalg.vector_norm(gradients, dtype=dtype).double().square())

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Of a rank alone: what this microbatch has added."""
        if not (self.measuring and self.alone):
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        now = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        if self._before:
            # In place: the gradients are held once more, not twice.
            torch._foreach_sub_(self._before, now)
        norms = torch._foreach_norm(self._before or now)
        self._parts.append(torch.stack(list(norms)).double().square().sum())
        self._left -= 1
        if self._left and self._before:
            torch._foreach_copy_(self._before, now)
        else:
            self._before = [gradient.clone() for gradient in now] if self._left else []

    def squares(self, like: Tensor) -> Tensor:
        """This rank's sum in the measured step, still with the loss scale: a scalar where `like` is."""
        parts = [part.to(like.device) for part in self._parts]
        return torch.stack(parts).sum() if parts else torch.zeros_like(like, dtype=torch.float64)
