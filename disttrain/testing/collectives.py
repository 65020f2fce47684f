"""Counting what a piece of code sends: every collective that passes torch's dispatcher, by kind and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    "all_gather": (
        "all_gather_into_tensor",
        "_allgather_base_",
        "allgather_",
        "allgather_into_tensor_coalesced_",
        "all_gather_single_",
    ),
    "reduce_scatter": (
        "reduce_scatter_tensor",
        "_reduce_scatter_base_",
        "reduce_scatter_",
        "reduce_scatter_tensor_coalesced_",
    ),
    "all_reduce": ("all_reduce", "allreduce_", "allreduce_coalesced_"),
    "broadcast": ("broadcast_",),
    "all_to_all": ("all_to_all_single", "alltoall_", "alltoall_base_"),
}
_KIND_OF = {operation: kind for kind, operations in _KINDS.items() for operation in operations}


class CollectiveCounter(TorchDispatchMode):
    """Within this context `calls[kind]` and `bytes[kind]` grow; bytes are those of the largest tensor of each call.

    That is the whole tensor: the gathered output of an all-gather, the input of a reduce-scatter. Collectives of
    other threads (a CUDA backward) are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Bytes that this rank sends to others, of all-to-alls and broadcasts (to each of the group once)."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what a DTensor sends is in the operations that it becomes
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        namespace = getattr(func, "namespace", "")
        # DTensor's own namespace has helpers besides.
        if namespace == "c10d" or (namespace == "_c10d_functional" and name in _KIND_OF):
            kind = _KIND_OF.get(name, name)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.calls[kind] += 1
            self.bytes[kind] += max((t.numel() * t.element_size() for t in tensors), default=0)
            self.sent[kind] += _sent_bytes(name, args)
        return result


def sharded_traffic(counter: CollectiveCounter, shards: int) -> tuple[dict[str, int], dict[str, int]]:
    """Calls and bytes by kind, in FSDP2's words: on gloo an all-gather travels as `shards` broadcasts, and a
    reduce-scatter as an all-to-all whose pieces each rank sums."""
    calls, moved = dict(counter.calls), dict(counter.bytes)
    for travelled, kind, pieces in (("broadcast", "all_gather", shards), ("all_to_all", "reduce_scatter", 1)):
        if travelled in calls:
            calls[kind] = calls.get(kind, 0) + calls.pop(travelled) // pieces
            moved[kind] = moved.get(kind, 0) + moved.pop(travelled)
    return calls, moved


def _sent_bytes(name: str, args: Sequence[Any]) -> int:
    if name == "alltoall_base_":
        _, sent, group, _, splits = args[:5]
        group = dist.ProcessGroup.unbox(group)
        kept = splits[group.rank()] if splits else len(sent) // group.size()
        return (len(sent) - kept) * sent[:1].numel() * sent.element_size()
    if name == "broadcast_":
        (tensor, *_), group, root = args[:3]
        group = dist.ProcessGroup.unbox(group)
        return (group.size() - 1) * tensor.numel() * tensor.element_size() * (group.rank() == root)
    return 0
