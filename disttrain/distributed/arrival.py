"""The meeting of all ranks before the process group: who does not come is named."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from disttrain.distributed.env import Ranks
from disttrain.errors import LaunchError, UserError

_LOOK_SECONDS = 1.0
_NAMED = 8
"""How many missing ranks are listed one by one."""


def meet(ranks: Ranks, timeout_seconds: float) -> dist.Store:
    """The store of the run, once every rank has been there. Collective.

    Rank 0 listens at MASTER_PORT (unless an agent does), where each leaves the name of its host. Raises UserError for a
    port that is in use, LaunchError with the missing ranks when `timeout_seconds` are over.
    """
    if ranks.head:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = ranks.head, str(ranks.port)
    began = time.monotonic()
    store = _open_store(ranks, timeout_seconds)
    store.set(_key(ranks.rank), f"{socket.gethostname()} {ranks.rank - ranks.local_rank}")
    while not store.check([_key(rank) for rank in range(ranks.world)]):
        if time.monotonic() - began > timeout_seconds:
            raise LaunchError(_who_is_missing(store, ranks, timeout_seconds))
        time.sleep(_LOOK_SECONDS if ranks.world > 64 else 0.02)
    return store


def _open_store(ranks: Ranks, timeout_seconds: float) -> dist.Store:
    """As torch opens it, but without its own wait for all clients, which knows only how many have not come."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"{host}:{port}"
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=ranks.is_first and not agent_listens,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(
                f"rank 0 cannot listen at {place}: the port is in use on {socket.gethostname()}, by another job or by "
                "what is left of one; end it, or set MASTER_PORT to another number on all ranks"
            ) from None
        raise LaunchError(
            f"rank 0 of {ranks.world} has not arrived: nobody listens at {place} after {timeout_seconds:.0f} s as seen "
            f"from {socket.gethostname()}; look at its log, and whether MASTER_ADDR is its address"
        ) from None
    # An agent keeps its store over restarts: what dead ranks left there must not be found.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"/worker/attempt_{attempt}", store) if agent_listens else store


def _who_is_missing(store: dist.Store, ranks: Ranks, timeout_seconds: float) -> str:
    hosts: dict[int, str] = {}
    missing = []
    for rank in range(ranks.world):
        if store.check([_key(rank)]):
            host, first = store.get(_key(rank)).decode().split(" ")
            hosts[int(first)] = host
        else:
            missing.append(rank)
    named = ", ".join(_named(rank, hosts, ranks.local_world) for rank in missing[:_NAMED])
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    noun, verb = ("rank", "has") if len(missing) == 1 else ("ranks", "have")
    return (
        f"{noun} {named}{more} of {ranks.world} {verb} not arrived after {timeout_seconds:.0f} s: look at their logs, "
        "and whether all nodes were started with the same command; resilience.arrival_timeout_seconds allows more time"
    )


def _named(rank: int, hosts: dict[int, str], local_world: int) -> str:
    """With its host, if a rank of the same node has come; else with the node's number."""
    first = rank // local_world * local_world
    return f"{rank} ({hosts[first]})" if first in hosts else f"{rank} (node {rank // local_world})"


def _key(rank: int) -> str:
    return f"disttrain/arrived/{rank}"
