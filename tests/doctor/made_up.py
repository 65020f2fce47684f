"""Facts of nodes that are well, for tests that then break one of them."""

from __future__ import annotations

from typing import Any

from disttrain.doctor.facts import (
    Disk,
    Gpu,
    Gpus,
    Interface,
    Limits,
    Link,
    Network,
    Node,
    Rank,
    Record,
    SharedMemory,
    Way,
)
from disttrain.doctor.finding import Finding

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "disttrain": "0.1.0", "disttrain code": "abcd0123", "CUDA": "12.8"}
LO = Interface(name="lo", addresses=("127.0.0.1",))
ETH = Interface(name="eth0", addresses=("10.0.0.1",))
CARD = Gpu(name="NVIDIA H100", uuid="GPU-1", memory_bytes=80 << 30, memory_used_bytes=0, ecc=True, uncorrected_errors=0)


def healthy(host: str = "a", **changed: Any) -> Node:
    facts: dict[str, Any] = {
        "host": host,
        "versions": VERSIONS,
        "network": Network(interfaces=(ETH, LO), host_name=host, host_addresses=("10.0.0.1",)),
        "limits": Limits(open_files=65_536),
        "shared_memory": SharedMemory(total_bytes=8 << 30, free_bytes=8 << 30),
        "disk": Disk(folder="/runs", free_bytes=10**12, write_bytes_per_second=1e9, fsync_seconds=1e-3),
        "gpus": Gpus(seen="/proc", driver="570.1", driver_cuda="12.8", cards=(CARD,) * 8),
    }
    return Node(**(facts | changed))


def record(*nodes: Node, **changed: Any) -> Record:
    """Of nodes that all reach each other in a tenth of a millisecond."""
    hosts = [node.host for node in nodes]
    ways = tuple(
        Way(source=a, target=b, address="x:1", connect_seconds=1e-4, clock_ahead_seconds=0.0, clock_error_seconds=5e-5)
        for a in hosts
        for b in hosts
        if a != b
    )
    facts = {"here": hosts[0], "nodes": {node.host: node for node in nodes}, "ways": ways, "waited_seconds": 25.0}
    return Record(**(facts | changed))


def measured(hosts: list[str], slow: dict[tuple[int, int], float] | None = None) -> tuple[Rank, ...]:
    """One rank on each host, all links 1 GB/s but for those in `slow`."""
    speeds = slow or {}
    return tuple(
        Rank(
            rank=rank,
            host=host,
            device="cpu",
            backend="gloo",
            compute_seconds=0.01,
            links=tuple(
                Link(sender=rank, receiver=to, bytes_per_second=speeds.get((rank, to), 1e9), latency_seconds=1e-5)
                for to in range(len(hosts))
                if to != rank
            ),
        )
        for rank, host in enumerate(hosts)
    )


def only(findings: list[Finding], severity: str = "breaks") -> Finding:
    """The one finding of that severity; it has a remedy."""
    (found,) = [finding for finding in findings if finding.severity == severity]
    assert found.remedy
    return found
