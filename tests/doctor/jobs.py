"""What the rank pool runs: the ranks' own measurements, with one thing broken on one rank."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from disttrain.distributed.env import Ranks
from disttrain.doctor import measure
from disttrain.doctor.facts import Collective, Link
from disttrain.doctor.links import measure_links
from disttrain.doctor.rank_results import collect_results, tell_progress, tell_result

CPU = torch.device("cpu")


def collectives(rank: int, world: int, corrupt: int | None = None, sends: bool = False) -> list[Collective]:
    """All of them; rank `corrupt` changes one number of what it gets by all_reduce, or of all that it `sends`."""
    real_reduce, real_gather, real_exchange = dist.all_reduce, dist.all_gather, dist.all_to_all_single

    def bad_reduce(tensor: torch.Tensor) -> None:
        real_reduce(tensor)
        tensor[17] += 0.5

    def bad_gather(rows: list[torch.Tensor], row: torch.Tensor) -> None:
        real_gather(rows, row + (torch.arange(len(row)) == 5))

    def bad_exchange(output: torch.Tensor, parts: torch.Tensor) -> None:
        real_exchange(output, parts + (torch.arange(parts.shape[1]) == 5))

    if rank == corrupt and sends:
        dist.all_gather, dist.all_to_all_single = bad_gather, bad_exchange
    elif rank == corrupt:
        dist.all_reduce = bad_reduce
    try:
        return [run(rank, world, CPU) for run in measure.COLLECTIVES.values()]
    finally:
        dist.all_reduce, dist.all_gather, dist.all_to_all_single = real_reduce, real_gather, real_exchange


def links(rank: int, world: int, local_world: int, corrupt: int | None = None) -> list[Link]:
    """Rank `corrupt` changes one number of each large message that it sends."""
    real = dist.send

    def bad_send(tensor: torch.Tensor, peer: int) -> None:
        real(tensor + (torch.arange(len(tensor)) == 3) if len(tensor) > 1 else tensor, peer)

    if rank == corrupt:
        dist.send = bad_send
    try:
        found: list[Link] = []
        measure_links(Ranks(rank=rank, world=world, local_world=local_world), CPU, found, lambda phase: None)
        return found
    finally:
        dist.send = real


def computation(rank: int, world: int, slow: int) -> tuple[float, float]:
    """Rank `slow` loops nine times as long as it has computed."""
    real = measure.build_work

    def build(device: torch.device) -> object:
        work = real(device)

        def slow_work() -> None:
            start = time.perf_counter()
            work()
            end = time.perf_counter() + 9 * (time.perf_counter() - start)
            while time.perf_counter() < end:
                pass

        return slow_work if rank == slow else work

    measure.build_work = build  # type: ignore[assignment]
    try:
        return measure.time_computation(CPU)
    finally:
        measure.build_work = real


def silent_rank(rank: int, world: int, path: str) -> tuple[list[int], dict[int, str]] | None:
    """The last rank stops saying anything in the middle; the first one collects."""
    store = dist.FileStore(path, -1)
    tell_progress(store, rank, f"host-{rank}", "in all_reduce")
    if rank < world - 1:
        tell_result(store, measure.Rank(rank=rank))
    if rank > 0:
        return None
    store.set_timeout(timedelta(seconds=5))
    results, missing = collect_results(store, world + 1, stall_seconds=0.3, start_seconds=0.5)
    return [result.rank for result in results], missing
