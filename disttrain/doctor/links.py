"""Messages between pairs of ranks, each way by itself: how long they take, and whether they arrive as they were."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.distributed.env import Ranks
from disttrain.doctor.facts import Link
from disttrain.doctor.pairing import link_rounds

FIRST_BYTES = 1 << 20
MOST_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
LINK_SECONDS = 0.1
"""What a measured message may take about; a slow link gets a small one."""
MESSAGES = 6
PINGS = 10


def measure_links(ranks: Ranks, device: torch.device, links: list[Link], enter: Callable[[str], None]) -> None:
    """Adds to `links` those that this rank sends on, which also tell what arrived at their other end."""
    rounds = link_rounds(ranks.world, ranks.local_world)
    for number, pairs in enumerate(rounds, start=1):
        enter(f"at the links, round {number} of {len(rounds)}")
        dist.barrier()
        for low, high in pairs:
            if ranks.rank == low:
                links.append(_send(low, high, device))
                _receive(high, device)
            elif ranks.rank == high:
                _receive(low, device)
                links.append(_send(high, low, device))


def _send(own: int, peer: int, device: torch.device) -> Link:
    latency = _ping(peer, device)
    count, speeds, wrong = FIRST_BYTES // 4, [], 0
    for _ in range(MESSAGES):
        dist.send(torch.tensor([count], device=device), peer)
        values = message(own, count, device)
        answer = torch.empty(1, device=device, dtype=torch.int64)
        start = time.perf_counter()
        dist.send(values, peer)
        dist.recv(answer, peer)
        answer.item()
        seconds = time.perf_counter() - start
        speeds.append(4 * count / max(seconds - latency, seconds / 2))
        dist.recv(answer, peer)  # only now: comparing takes time too
        wrong += int(answer.item())
        count = _next_count(count, seconds, device)
    # The first one has told the size. The best of the others: a core that was busy for a moment is not the link.
    speed = max(speeds[1:])
    return Link(sender=own, receiver=peer, bytes_per_second=speed, latency_seconds=latency, wrong_elements=wrong)


def _receive(peer: int, device: torch.device) -> None:
    number = torch.zeros(1, device=device, dtype=torch.int64)
    for _ in range(PINGS):
        dist.recv(number, peer)
        dist.send(number, peer)
    for _ in range(MESSAGES):
        dist.recv(number, peer)
        values = torch.empty(int(number.item()), device=device)
        dist.recv(values, peer)
        dist.send(number, peer)
        wrong = values.ne(message(peer, len(values), device)).sum().reshape(1)
        dist.send(wrong, peer)


def _ping(peer: int, device: torch.device) -> float:
    """Seconds of one way: half of the median round trip."""
    number = torch.zeros(1, device=device, dtype=torch.int64)
    times = []
    for _ in range(PINGS):
        start = time.perf_counter()
        dist.send(number, peer)
        dist.recv(number, peer)
        number.item()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / 2


def message(sender: int, count: int, device: torch.device) -> Tensor:
    return torch.remainder(torch.arange(count, device=device), 8191).float() + sender


def _next_count(count: int, seconds: float, device: torch.device) -> int:
    wanted = int(4 * count * LINK_SECONDS / max(seconds, 1e-6))
    return min(max(wanted, FIRST_BYTES), MOST_BYTES[device.type]) // 4
