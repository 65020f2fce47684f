"""Who computes which matrix and what travels for it, as data: it prints, and is tested without processes.

Processes are a grid of `replicas` x `shards`: along a row they hold different shards of one copy of the model, down a
column the same shard. A matrix has one owner among the shards of a copy, to whom its regions travel and from whom the
result comes back. Without `spread` every copy computes for itself; with it the owner sits in one copy only, and each
process of that copy broadcasts its part of the result down its column. Plain data parallelism is the grid of one shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod


@dataclass(frozen=True)
class Box:
    """A part of a matrix: `offsets` and `sizes`, rows and columns."""

    offsets: tuple[int, int]
    sizes: tuple[int, int]

    @property
    def elements(self) -> int:
        return prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, slice]:
        first, second = (slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))
        return first, second

    def within(self, other: Box) -> Box:
        """The part that both have, seen from the corner of `other`."""
        spans = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        cut = [(max(a, c), min(a + n, c + m), c) for a, n, c, m in spans]
        (top, bottom, row), (left, right, column) = cut
        sizes = (max(bottom - top, 0), max(right - left, 0))
        return Box((top - row, left - column) if prod(sizes) else (0, 0), sizes)


@dataclass(frozen=True)
class MatrixUnit:
    """One matrix that is computed whole; `regions` are what each shard has of it, in its own coordinates."""

    name: str
    shape: tuple[int, int]
    regions: tuple[Box, ...]
    flops: float
    settings: str = ""
    """What is computed, in words; part of the digest."""

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Units (by their number) that travel together, and the owner of each."""

    units: tuple[int, ...]
    owners: tuple[int, ...]


@dataclass(frozen=True)
class MatrixPlan:
    """Built by `build_plan`. Owners are counted along the rows of the grid: copy by copy with `spread`."""

    units: tuple[MatrixUnit, ...]
    shards: int
    replicas: int
    spread: bool
    element_bytes: int
    buckets: tuple[Bucket, ...]

    @property
    def workers(self) -> int:
        """How many processes share the computation."""
        return self.shards * (self.replicas if self.spread else 1)

    def place(self, owner: int) -> tuple[int | None, int]:
        """The copy (None for every copy) and the shard of an owner."""
        return divmod(owner, self.shards) if self.spread else (None, owner)

    def members(self, bucket: Bucket, replica: int) -> Iterator[tuple[int, int]]:
        """Units that the copy `replica` computes, with the shard that owns them."""
        for unit, owner in zip(bucket.units, bucket.owners, strict=True):
            copy, shard = self.place(owner)
            if copy in (None, replica):
                yield unit, shard

    def travels(self, bucket: Bucket, replica: int) -> bool:
        """Whether anything of a bucket moves between the shards of a copy: not where owners hold all that they need."""
        return any(self.units[u].regions[o].elements < self.units[u].elements for u, o in self.members(bucket, replica))

    def sent_bytes(self, replica: int, shard: int) -> int:
        """What one process sends to others in a step; a broadcast sends to each of the other copies."""
        elements = 0
        for bucket in self.buckets:
            for unit, owner in self.members(bucket, replica):
                held = self.units[unit].regions[shard].elements
                elements += held if owner != shard else self.units[unit].elements - held
                elements += held * (self.replicas - 1) * self.spread
        return elements * self.element_bytes

    @cached_property
    def total_sent_bytes(self) -> int:
        """Over all processes."""
        return sum(self.sent_bytes(replica, shard) for replica in range(self.replicas) for shard in range(self.shards))

    def loads(self, bucket: Bucket) -> list[float]:
        """Floating-point operations of each worker."""
        loads = [0.0] * self.workers
        for unit, owner in zip(bucket.units, bucket.owners, strict=True):
            loads[owner] += self.units[unit].flops
        return loads

    @property
    def imbalance(self) -> float:
        """The dearest owner's operations over the mean, each summed over buckets: 1 is a perfect balance."""
        loads = [self.loads(bucket) for bucket in self.buckets]
        dearest, mean = sum(map(max, loads)), sum(map(sum, loads)) / self.workers
        return dearest / mean if mean else 1.0

    @cached_property
    def digest(self) -> str:
        """Equal plans, equal digests: processes with different ones would wait for each other for ever."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def summary(self) -> str:
        """One line."""
        elements = sum(unit.elements for unit in self.units)
        how = _count(self.shards, "shard", "shards")
        how = how if self.replicas == 1 else f"{self.replicas} copies of {how}"
        once = (
            "" if self.replicas == 1 else ", each matrix computed once" if self.spread else ", each copy computes all"
        )
        return (
            f"{_count(len(self.units), 'matrix', 'matrices')} ({elements:,} elements) over {how}{once}: "
            f"{_count(len(self.buckets), 'bucket', 'buckets')}, "
            f"{self.total_sent_bytes / 1e6:,.1f} MB sent a step by all, dearest owner {self.imbalance:.2f} of the mean"
        )

    def table(self) -> list[str]:
        """Every bucket, and every owner's share of it; loads in GFLOP."""
        lines = [self.summary(), "bucket  owner  GFLOP     matrices"]
        for number, bucket in enumerate(self.buckets):
            for owner, load in enumerate(self.loads(bucket)):
                owned = [self.units[u] for u, o in zip(bucket.units, bucket.owners, strict=True) if o == owner]
                names = ", ".join(f"{u.name} {u.shape[0]}x{u.shape[1]}" for u in owned) or "-"
                lines.append(f"{number:>6}  {owner:>5}  {load / 1e9:<8.3g}  {names}")
        return lines


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def build_plan(
    units: Sequence[MatrixUnit],
    *,
    shards: int,
    replicas: int = 1,
    spread: bool = False,
    element_bytes: int = 4,
    bucket_bytes: int = 16 * 2**20,
) -> MatrixPlan:
    """Owners by longest processing time first, with loads carried from bucket to bucket; the same on every process.

    Dear units come first, equal ones together. A unit that one shard holds alone stays there. Raises ValueError where
    the regions of a unit do not tile it.
    """
    for unit in units:
        held = sum(region.elements for region in unit.regions)
        if len(unit.regions) != shards or held != unit.elements:
            raise ValueError(f"{unit.name}: {len(unit.regions)} regions of {held} elements for {unit.elements}")
    workers = shards * (replicas if spread else 1)
    order = sorted(range(len(units)), key=lambda index: (-units[index].flops, units[index].shape, index))
    loads, buckets = [0.0] * workers, []
    for members in _buckets(units, order, workers, bucket_bytes // element_bytes):
        owners = []
        for unit in (units[index] for index in members):
            holders = [shard for shard, region in enumerate(unit.regions) if region.elements]
            alone = [worker for worker in range(workers) if len(holders) == 1 and worker % shards == holders[0]]
            owner = min(alone or range(workers), key=lambda worker: (loads[worker], worker))
            loads[owner] += unit.flops
            owners.append(owner)
        buckets.append(Bucket(tuple(members), tuple(owners)))
    return MatrixPlan(tuple(units), shards, replicas, spread, element_bytes, tuple(buckets))


def _buckets(units: Sequence[MatrixUnit], order: list[int], workers: int, most_elements: int) -> Iterator[list[int]]:
    """Cut where a process has enough to send and every worker as many matrices; a rest too small for all joins."""
    bucket: list[int] = []
    elements = 0
    for done, index in enumerate(order, start=1):
        bucket.append(index)
        elements += units[index].elements
        rest = len(order) - done
        if elements >= most_elements * workers and len(bucket) % workers == 0 and rest >= workers:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket


def spread_pays(
    units: Sequence[MatrixUnit], shards: int, replicas: int, element_bytes: int, flops: float, bandwidth: float
) -> tuple[bool, str]:
    """Whether copies should share the computation: what that saves in time against what it sends; and in words.

    `flops` and `bandwidth` are those of one process, per second; bandwidth that between copies.
    """
    share = (1 - 1 / replicas) / shards
    saved = sum(unit.flops for unit in units) * share / flops
    spent = sum(unit.elements for unit in units) * element_bytes * share / bandwidth
    words = f"computing once saves {saved * 1e3:.3g} ms at {flops:.3g} FLOP/s, sending costs {spent * 1e3:.3g} ms"
    return saved > spent, f"{words} at {bandwidth:.3g} B/s"


def row_regions(shape: tuple[int, int], shards: int) -> tuple[Box, ...]:
    """What each shard has of a matrix cut by rows as FSDP2 cuts it: equal chunks, the last ones smaller or empty."""
    rows, columns = shape
    chunk = -(-rows // shards)
    starts = [min(shard * chunk, rows) for shard in range(shards + 1)]
    return tuple(Box((a if b > a else 0, 0), (b - a, columns)) for a, b in pairwise(starts))
