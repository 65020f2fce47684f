"""What one rank measures together with the others: are results right, how fast is each link, how fast is each rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.distributed.env import Ranks
from disttrain.doctor.facts import Collective, Link, Rank
from disttrain.doctor.links import measure_links

GROUP_SECONDS = 20.0
"""How long a rank waits for the others inside one operation."""
ELEMENTS = 1 << 16
"""Of each rank's part in a collective; fewer where so many parts come together that they would fill the memory."""
MOST_ELEMENTS = 1 << 23
TIMED_BYTES = 8 << 20
CHUNKS = 7

Progress = Callable[[str], None]


def measure_rank(store: dist.Store, ranks: Ranks, host: str, device: torch.device, progress: Progress) -> Rank:
    """Everything, or what was measured until something failed; nothing is raised."""
    at = "at the start"
    found = Rank(rank=ranks.rank, host=host, device=device.type, backend="nccl" if device.type == "cuda" else "gloo")

    def enter(phase: str) -> None:
        nonlocal at
        at = phase
        progress(phase)

    try:
        enter("meeting the other ranks")
        _join(store, ranks, device, found.backend)
        enter("waiting for all before the computation")
        dist.barrier()
        enter("the fixed computation")
        seconds, share = time_computation(device)
        found = found.model_copy(update={"compute_seconds": seconds, "compute_cpu_share": share})
        results = []
        for name, run in COLLECTIVES.items():
            enter(f"in {name}")
            results.append(run(ranks.rank, ranks.world, device))
        found = found.model_copy(update={"collectives": tuple(results)})
        links: list[Link] = []
        measure_links(ranks, device, links, enter)
        found = found.model_copy(update={"links": tuple(links)})
        enter("done")
    except Exception as error:
        what = str(error).strip().splitlines() or [type(error).__name__]
        return found.model_copy(update={"failed": f"{at}: {what[0][:300]}"})
    return found


def _join(store: dist.Store, ranks: Ranks, device: torch.device, backend: str) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    timeout = timedelta(seconds=GROUP_SECONDS)
    group = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=ranks.rank, world_size=ranks.world, timeout=timeout)


def time_computation(device: torch.device) -> tuple[float, float]:
    """Median seconds of a computation that is the same on all ranks, and CPU time over wall time meanwhile."""
    work = build_work(device)
    work()
    times = []
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(CHUNKS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return statistics.median(times), share


def build_work(device: torch.device) -> Callable[[], None]:
    """Matrix products, some tens of milliseconds on a core or on a GPU."""
    width, products, dtype = (4096, 40, torch.bfloat16) if device.type == "cuda" else (256, 30, torch.float32)
    matrix = torch.full((width, width), 0.5, device=device, dtype=dtype)

    def work() -> None:
        result = matrix
        for _ in range(products):
            result = matrix @ matrix
        result[0, 0].item()  # a GPU is asked, not only told

    return work


def all_reduce(rank: int, world: int, device: torch.device) -> Collective:
    """Small whole numbers, whose sums fp32 holds exactly; the timed one is larger."""
    values = _pattern(rank, world, device)
    dist.all_reduce(values)
    expected = torch.stack([_pattern(peer, world, device) for peer in range(world)]).sum(0)
    large = torch.ones(TIMED_BYTES // 4, device=device)
    dist.all_reduce(large)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(large)
    large[0].item()
    seconds = time.perf_counter() - start
    speed = 2 * (world - 1) / world * TIMED_BYTES / seconds if world > 1 else None
    return _compare("all_reduce", values, expected, bus_bytes_per_second=speed)


def broadcast(rank: int, world: int, device: torch.device) -> Collective:
    values = _pattern(rank, world, device)
    source = world - 1
    dist.broadcast(values, source)
    return _compare("broadcast", values, _pattern(source, world, device), senders=[source])


def all_gather(rank: int, world: int, device: torch.device) -> Collective:
    rows = [torch.empty(_elements(world), device=device) for _ in range(world)]
    dist.all_gather(rows, _pattern(rank, world, device))
    expected = torch.stack([_pattern(peer, world, device) for peer in range(world)])
    return _compare("all_gather", torch.stack(rows), expected, senders=list(range(world)))


def reduce_scatter(rank: int, world: int, device: torch.device) -> Collective:
    part = torch.empty(_elements(world), device=device)
    dist.reduce_scatter(part, [_pattern(rank + peer, world, device) for peer in range(world)])
    expected = torch.stack([_pattern(peer + rank, world, device) for peer in range(world)]).sum(0)
    return _compare("reduce_scatter", part, expected)


def all_to_all(rank: int, world: int, device: torch.device) -> Collective:
    parts = torch.empty(world, _elements(world), device=device)
    dist.all_to_all_single(parts, torch.stack([_pattern(world * rank + peer, world, device) for peer in range(world)]))
    expected = torch.stack([_pattern(world * peer + rank, world, device) for peer in range(world)])
    return _compare("all_to_all", parts, expected, senders=list(range(world)))


COLLECTIVES = {
    "all_reduce": all_reduce,
    "broadcast": broadcast,
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "all_to_all": all_to_all,
}


def _elements(world: int) -> int:
    return max(1, min(ELEMENTS, MOST_ELEMENTS // world))


def _pattern(seed: int, world: int, device: torch.device) -> Tensor:
    """Whole numbers below 128, another order for each seed; sums over 2**17 ranks are exact in fp32."""
    return torch.remainder(torch.arange(_elements(world), device=device) * (2 * seed + 3) + seed, 127).float()


def _compare(
    name: str,
    values: Tensor,
    expected: Tensor,
    senders: list[int] | None = None,
    bus_bytes_per_second: float | None = None,
) -> Collective:
    """Element by element; rows are from one sender each, where there are `senders`."""
    wrong = values.ne(expected)
    rows = wrong.reshape(len(senders), -1).any(1).tolist() if senders else []
    return Collective(
        name=name,
        elements=values.numel(),
        wrong_elements=int(wrong.sum()),
        max_error=float((values - expected).abs().max()),
        wrong_from=tuple(sender for sender, bad in zip(senders or (), rows, strict=True) if bad),
        bus_bytes_per_second=bus_bytes_per_second,
    )
