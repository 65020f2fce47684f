"""The doctor as one of the ranks that torchrun or srun has started: nodes meet in the launcher's store."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from disttrain.distributed.env import Ranks
from disttrain.distributed.process_group import select_device
from disttrain.doctor.check_network import check_network
from disttrain.doctor.check_nodes import check_arrival, check_ways
from disttrain.doctor.facts import Node, Rank, Record
from disttrain.doctor.finding import exit_code
from disttrain.doctor.launcher import Launch
from disttrain.doctor.measure import measure_rank
from disttrain.doctor.meeting import SHARE_SECONDS, Exchange, meet
from disttrain.doctor.needs import Needs
from disttrain.doctor.rank_results import StoreExchange, collect_results, tell_progress, tell_result
from disttrain.errors import UserError

VERDICT_SECONDS = 900.0
"""How long other ranks wait for the first one's verdict, which comes once all results have or have not come."""
LEAVE_SECONDS = 5.0
_LOOK_SECONDS = 0.05
_GO, _VERDICT = "go", "verdict"


def open_store(launch: Launch, ranks: Ranks, seconds: float) -> dist.Store:
    """Raises RuntimeError (torch's) where it cannot be opened or reached in time."""
    listens = ranks.is_first and not launch.agent_listens
    timeout = timedelta(seconds=seconds)
    store = dist.TCPStore(
        launch.host, launch.port, is_master=listens, timeout=timeout, wait_for_workers=False, multi_tenant=False
    )
    return dist.PrefixStore(launch.key, store)


def visit(
    store: dist.Store, ranks: Ranks, needs: Needs, node: Node, wait_seconds: float, exchange: Exchange | None
) -> Record | None:
    """This rank's part. The first rank gets the whole record; the others None, and then the verdict from the store.

    `node` has the facts of this rank's node. With an `exchange` nodes meet there and not in the store.
    """
    store.set(f"arrived/{ranks.rank}", node.host)
    record = None
    if ranks.local_rank == 0:
        speakers = range(0, ranks.world, ranks.local_world)
        record = meet(exchange or StoreExchange(store, ranks.rank, speakers), node, needs, wait_seconds)
    if record is not None and ranks.is_first:
        record = _all_ranks_here(store, needs, record, wait_seconds)
        store.set(_GO, record.not_measured or "")
    elif (why := _wait_for(store, _GO, 2 * wait_seconds + SHARE_SECONDS)) is None:
        tell_progress(store, ranks.rank, node.host, "waiting for the first rank")
        return None
    elif why:
        return None
    if record is None or record.not_measured is None:
        _measure(store, ranks, needs, node.host)
    if record is None or not ranks.is_first:
        return None
    if record.not_measured is not None:
        return record
    results, missing = collect_results(store, ranks.world)
    return record.model_copy(update={"ranks": tuple(results), "missing_ranks": missing})


def tell_verdict(store: dist.Store, ranks: Ranks, code: int) -> None:
    """Stays until the other ranks have heard it, for a moment: the store may end with this process."""
    store.set(_VERDICT, str(code))
    end = time.monotonic() + LEAVE_SECONDS
    keys = [f"left/{rank}" for rank in range(1, ranks.world) if store.check([f"arrived/{rank}"])]
    while keys and time.monotonic() < end and not store.check(keys):
        time.sleep(_LOOK_SECONDS)


def wait_for_verdict(store: dist.Store, ranks: Ranks) -> int | None:
    """The exit code of all ranks; None where the first one says nothing."""
    text = _wait_for(store, _VERDICT, VERDICT_SECONDS)
    store.set(f"left/{ranks.rank}", "")
    return None if text is None else int(text)


def _all_ranks_here(store: dist.Store, needs: Needs, record: Record, wait_seconds: float) -> Record:
    """Whether there is a point in collectives, which would only wait for what is missing."""
    end = time.monotonic() + max(0.0, wait_seconds - record.waited_seconds)
    while True:
        missing = [rank for rank in range(needs.world) if not store.check([f"arrived/{rank}"])]
        if not missing or time.monotonic() >= end:
            break
        time.sleep(_LOOK_SECONDS)
    nodes = [*check_arrival(record, needs), *check_ways(record)]
    network = [finding for node in record.nodes.values() for finding in check_network(node, needs)]
    why = None
    if missing:
        why = f"{len(missing)} of {needs.world} ranks did not come"
    elif exit_code(nodes):
        why = "nodes are missing or do not reach each other"
    elif exit_code(network):
        why = "a node's network is not fit for them, they would only wait"
    return record.model_copy(update={"missing_ranks": dict.fromkeys(missing, ""), "not_measured": why})


def _measure(store: dist.Store, ranks: Ranks, needs: Needs, host: str) -> None:
    progress = partial(tell_progress, store, ranks.rank, host)
    try:
        device = select_device(needs.device, ranks.local_rank)
    except UserError as error:
        tell_result(store, Rank(rank=ranks.rank, host=host, failed=f"choosing its device: {error.problems[0]}"))
        return
    tell_result(store, measure_rank(store, ranks, host, device, progress))


def _wait_for(store: dist.Store, key: str, seconds: float) -> str | None:
    end = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() >= end:
            return None
        time.sleep(_LOOK_SECONDS)
    return store.get(key).decode()
