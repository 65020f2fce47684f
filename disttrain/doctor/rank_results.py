"""How ranks hand their results on through a store, and how somebody collects them without waiting for the dead."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist

from disttrain.doctor.facts import Rank
from disttrain.doctor.measure import GROUP_SECONDS

STALL_SECONDS = GROUP_SECONDS + 5.0
"""A rank that is at the same thing for longer will give no result: the others have given up on it."""
_LOOK_SECONDS = 0.05


class StoreExchange:
    """An `Exchange` over a launcher's store; `speakers` are the first ranks of the nodes, `rank` is the own one."""

    def __init__(self, store: dist.Store, rank: int, speakers: Sequence[int]) -> None:
        self._store, self._rank, self._speakers = store, rank, speakers

    def publish(self, kind: str, text: str) -> None:
        self._store.set(f"{kind}/{self._rank}", text)

    def read(self, kind: str) -> list[str]:
        keys = [f"{kind}/{rank}" for rank in self._speakers]
        return [self._store.get(key).decode() for key in keys if self._store.check([key])]


def tell_progress(store: dist.Store, rank: int, host: str, phase: str) -> None:
    store.set(f"phase/{rank}", f"{host}: {phase}")


def tell_result(store: dist.Store, result: Rank) -> None:
    store.set(f"result/{result.rank}", result.model_dump_json())


def collect_results(
    store: dist.Store, world: int, stall_seconds: float = STALL_SECONDS, start_seconds: float = STALL_SECONDS
) -> tuple[list[Rank], dict[int, str]]:
    """Results by rank, and of ranks that stand still or never begin the last thing that they were seen at.

    `start_seconds` is for ranks that have not begun yet.
    """
    results: dict[int, Rank] = {}
    seen: dict[int, tuple[str, float]] = {rank: ("", time.monotonic()) for rank in range(world)}
    missing: dict[int, str] = {}
    while len(results) + len(missing) < world:
        for rank in range(world):
            if rank in results or rank in missing:
                continue
            if store.check([f"result/{rank}"]):
                results[rank] = Rank.model_validate_json(store.get(f"result/{rank}"))
                continue
            phase = store.get(f"phase/{rank}").decode() if store.check([f"phase/{rank}"]) else ""
            if phase != seen[rank][0]:
                seen[rank] = (phase, time.monotonic())
            elif time.monotonic() - seen[rank][1] > (stall_seconds if phase else start_seconds):
                missing[rank] = phase
        time.sleep(_LOOK_SECONDS)
    return [results[rank] for rank in sorted(results)], missing
