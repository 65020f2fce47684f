"""Ranks of this machine, started and ended by the doctor itself: a file between them in place of a rendezvous."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from disttrain.distributed.env import Ranks
from disttrain.distributed.process_group import select_device
from disttrain.doctor.facts import Rank
from disttrain.doctor.measure import measure_rank
from disttrain.doctor.rank_results import STALL_SECONDS, collect_results, tell_progress, tell_result

LEAVE_SECONDS = 2.0
IMPORT_SECONDS = 90.0
"""How long torch may take to be imported by a new process."""


def run_local_ranks(
    nproc: int, wanted: str, host: str, stall_seconds: float = STALL_SECONDS
) -> tuple[list[Rank], dict[int, str]]:
    """Results of `nproc` ranks, and those that gave none; UserError for a device that cannot be used."""
    kind = select_device(wanted, nproc - 1).type
    # Forked ranks start with torch imported; CUDA does not survive a fork.
    context = multiprocessing.get_context("fork" if kind == "cpu" else "spawn")
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        path = str(Path(folder) / "store")
        processes = [
            context.Process(target=_rank_main, args=(rank, nproc, path, kind, host), daemon=True)  # type: ignore[attr-defined]
            for rank in range(nproc)
        ]
        for process in processes:
            process.start()
        try:
            start_seconds = stall_seconds if kind == "cpu" else IMPORT_SECONDS
            return collect_results(dist.FileStore(path, -1), nproc, stall_seconds, start_seconds)
        finally:
            for process in processes:
                process.join(LEAVE_SECONDS / nproc)
                process.kill()
                process.join()


def _rank_main(rank: int, world: int, path: str, kind: str, host: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    store = dist.FileStore(path, -1)
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world)
    tell_result(store, measure_rank(store, ranks, host, device, partial(tell_progress, store, rank, host)))
    # Without a teardown: a peer may be stopped.
    os._exit(0)
