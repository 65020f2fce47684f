"""Matrices to their owners and back: packed all-to-alls of regions, with nothing padded, under a `MatrixPlan`.

Every call starts its communication and returns what to wait for, so that one bucket travels while another computes.
All processes of the plan's grid must make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.errors import UserError
from disttrain.optim.matrix_layout import Layout
from disttrain.optim.matrix_plan import Box, Bucket, MatrixPlan

T = TypeVar("T")


@dataclass(frozen=True)
class Travelling(Generic[T]):
    """What is on its way; `wait` gives it."""

    unpack: Callable[[], T]
    works: tuple[dist.Work, ...] = ()
    kept: tuple[Tensor, ...] = field(default=(), repr=False)
    """What is being sent must not be freed before it has arrived."""

    def wait(self) -> T:
        for work in self.works:
            work.wait()
        return self.unpack()


class MatrixExchange:
    """The traffic of one plan on one grid; matrices travel as `dtype`. Collective: plans are compared once."""

    def __init__(self, plan: MatrixPlan, layout: Layout, dtype: torch.dtype) -> None:
        self.plan, self.layout, self.dtype = plan, layout, dtype
        dist_compare_plans(plan, layout)

    def owned(self, bucket: Bucket) -> list[int]:
        """The units of `bucket` that this process computes."""
        return [unit for unit, shard in self._here(bucket) if shard == self.layout.shard]

    def dist_collect(self, bucket: Bucket, parts: Mapping[int, Tensor]) -> Travelling[dict[int, Tensor]]:
        """Send this shard's `parts` of units to their owners; arrives as the whole matrices that this process owns."""
        me, units, mine = self.layout.shard, self.plan.units, self.owned(bucket)

        def unpack(arrived: list[list[Tensor]]) -> dict[int, Tensor]:
            wholes = {}
            for index, unit in enumerate(mine):
                # A tensor of its own: products on a slice of a packed buffer may be summed in another order.
                whole = torch.empty(units[unit].shape, dtype=self.dtype, device=self.layout.device)
                pieces = [parts[unit] if shard == me else of[index] for shard, of in enumerate(arrived)]
                for region, piece in zip(units[unit].regions, pieces, strict=True):
                    whole[region.slices] = piece.view(region.sizes)
                wholes[unit] = whole
            return wholes

        peers = range(self.plan.shards)
        send = [[parts[u] for u, owner in self._here(bucket) if owner == peer != me] for peer in peers]
        receive = [[units[u].regions[peer] for u in mine if peer != me] for peer in peers]
        return self._dist_all_to_all(bucket, send, receive, unpack)

    def dist_give_back(self, bucket: Bucket, wholes: Mapping[int, Tensor]) -> Travelling[dict[int, Tensor]]:
        """Send each shard its regions of the `wholes` that this process owns; arrives as this shard's parts."""
        me, units, mine = self.layout.shard, self.plan.units, self.owned(bucket)
        kept = {unit: wholes[unit].to(self.dtype) for unit in mine}
        awaited = [
            [unit for unit, owner in self._here(bucket) if owner == peer != me] for peer in range(self.plan.shards)
        ]

        def unpack(arrived: list[list[Tensor]]) -> dict[int, Tensor]:
            parts = {unit: kept[unit][units[unit].regions[me].slices] for unit in mine}
            for of_peer, named in zip(arrived, awaited, strict=True):
                parts |= {
                    unit: piece.view(units[unit].regions[me].sizes) for unit, piece in zip(named, of_peer, strict=True)
                }
            return parts

        send = [
            [kept[u][units[u].regions[peer].slices] for u in mine if peer != me] for peer in range(self.plan.shards)
        ]
        receive = [[units[u].regions[me] for u in named] for named in awaited]
        return self._dist_all_to_all(bucket, send, receive, unpack)

    def dist_share(self, bucket: Bucket, parts: Mapping[int, Tensor]) -> Travelling[dict[int, Tensor]]:
        """Broadcast this shard's parts from the copy that computed them to the others; arrives as all of them."""
        plan, layout = self.plan, self.layout
        works: list[dist.Work] = []
        buffers: list[tuple[list[int], Tensor]] = []
        for replica in range(plan.replicas):
            named = [unit for unit, _ in plan.members(bucket, replica)]
            regions = [plan.units[unit].regions[layout.shard] for unit in named]
            if not sum(region.elements for region in regions):
                buffers.append((named, torch.empty(0, dtype=self.dtype, device=layout.device)))
                continue
            packed = (
                _pack([parts[unit] for unit in named], self.dtype, layout.device)
                if replica == layout.replica
                else torch.empty(sum(r.elements for r in regions), dtype=self.dtype, device=layout.device)
            )
            work = dist.broadcast(packed, group=layout.replica_group, group_src=replica, async_op=True)
            works += [work] if work is not None else []
            buffers.append((named, packed))

        def unpack() -> dict[int, Tensor]:
            everything: dict[int, Tensor] = {}
            for named, packed in buffers:
                regions = [plan.units[unit].regions[layout.shard] for unit in named]
                pieces = packed.split([region.elements for region in regions])
                everything |= {u: p.view(r.sizes) for u, r, p in zip(named, regions, pieces, strict=True)}
            return everything

        return Travelling(unpack, tuple(works), tuple(packed for _, packed in buffers))

    def _here(self, bucket: Bucket) -> list[tuple[int, int]]:
        """The units that this copy of the model computes, with their owners among its shards."""
        return list(self.plan.members(bucket, self.layout.replica))

    def _dist_all_to_all(
        self,
        bucket: Bucket,
        send: list[list[Tensor]],
        receive: list[list[Box]],
        unpack: Callable[[list[list[Tensor]]], dict[int, Tensor]],
    ) -> Travelling[dict[int, Tensor]]:
        """`send` and `receive` are by shard; what a process keeps for itself does not travel."""
        if self.layout.shard_group is None or not self.plan.travels(bucket, self.layout.replica):
            nothing = torch.empty(0, dtype=self.dtype, device=self.layout.device)
            return Travelling(lambda: unpack([[nothing] * len(regions) for regions in receive]))
        sizes = [[region.elements for region in regions] for regions in receive]
        outgoing = _pack([part for parts in send for part in parts], self.dtype, self.layout.device)
        incoming = outgoing.new_empty(sum(map(sum, sizes)))
        work = dist.all_to_all_single(
            incoming,
            outgoing,
            [sum(of_peer) for of_peer in sizes],
            [sum(part.numel() for part in parts) for parts in send],
            group=self.layout.shard_group,
            async_op=True,
        )

        def unpacked() -> dict[int, Tensor]:
            by_peer = incoming.split([sum(of_peer) for of_peer in sizes])
            return unpack([list(flat.split(of_peer)) for flat, of_peer in zip(by_peer, sizes, strict=True)])

        return Travelling(unpacked, (work,) if work is not None else (), (outgoing,))


def dist_compare_plans(plan: MatrixPlan, layout: Layout) -> None:
    """Raises UserError on every process of the grid when one has another plan: they would wait for each other for ever.

    Along the rows of the grid, then along its columns with what the rows have found.
    """
    held = torch.frombuffer(bytearray.fromhex(plan.digest), dtype=torch.int64).to(layout.device)
    size = len(held)
    for group in (layout.shard_group, layout.replica_group):
        if group is not None:
            gathered = [torch.empty_like(held) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, held, group=group)
            held = torch.cat(gathered)
    ranks = [rank for row in layout.grid for rank in row]
    digests = held.split(size)
    if others := [str(r) for r, seen in zip(ranks, digests, strict=True) if not torch.equal(seen, digests[0])]:
        raise UserError(
            f"the plan for exchanging matrices differs: rank {ranks[0]} has another than rank {', '.join(others[:8])}; "
            f"give every process the same model and optim settings. Here: {plan.summary()}"
        )


def _pack(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    flat = [part.reshape(-1) for part in parts]
    return torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
