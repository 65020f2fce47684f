"""How nodes find each other: each leaves its facts where the others look, calls the others, and leaves what came of it.

Where that is, an `Exchange` knows: a folder that all of them see (nothing has to run yet), or a launcher's store.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from disttrain.doctor.facts import Facts, Node, Record, Way
from disttrain.doctor.needs import Needs
from disttrain.doctor.network import listening_address
from disttrain.doctor.reach import Listener, call_node

ALL_PAIRS = 64
"""With more nodes each calls the first one and its next `RING` neighbours: the square of thousands is too much."""
RING = 8
SHARE_SECONDS = 7.0
"""How much longer than for the nodes themselves to wait for what came of their calls."""
_LOOK_SECONDS = 0.1
_CALLERS = ALL_PAIRS


class Exchange(Protocol):
    def publish(self, kind: str, text: str) -> None:
        """Leave `text` for the others, in place of what this node has left under `kind` before."""

    def read(self, kind: str) -> list[str]:
        """What each node, this one too, has left under `kind` until now."""


class Calls(Facts):
    """What one node's calls have come to, and which visit of whom it had called."""

    host: str
    nonce: str
    seen: dict[str, str]
    ways: tuple[Way, ...]


class FolderExchange:
    """Files in a folder that all nodes see. What was there long before this visit is of an earlier one.

    The age is told by the file server's clock, which is the same for all. OSError where the folder refuses.
    """

    def __init__(self, folder: Path, host: str, window_seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._host, self._window = folder, host, window_seconds
        self._began: float | None = None

    def publish(self, kind: str, text: str) -> None:
        file = self._folder / f"{self._host}.{kind}.json"
        whole = file.with_suffix(f".{time.monotonic_ns()}.tmp")
        whole.write_text(text, encoding="utf-8")
        whole.replace(file)
        if self._began is None:
            self._began = file.stat().st_mtime

    def read(self, kind: str) -> list[str]:
        texts = []
        for file in sorted(self._folder.glob(f"*.{kind}.json")):
            with suppress(OSError):  # it is being replaced
                if file.stat().st_mtime >= (self._began or 0.0) - self._window:
                    texts.append(file.read_text(encoding="utf-8", errors="replace"))
        return texts


def meet(exchange: Exchange, node: Node, needs: Needs, wait_seconds: float, own_clock: float = 0.0) -> Record:
    """Wait until all nodes of `needs` are here and have been called, `wait_seconds` at most; then tell who was.

    `own_clock` is added to this node's clock: for tests.
    """
    began = time.monotonic()

    def clock() -> float:
        return time.time() + own_clock

    with Listener(listening_address(node.network), node.nonce, clock) as listener:
        node = node.model_copy(update={"listens": listener.place, "unix_seconds": clock()})
        exchange.publish("facts", node.model_dump_json())
        ways: dict[str, tuple[str, Way]] = {}
        while True:
            here, doubles = _by_host(exchange.read("facts"), node)
            peers = _to_call(here, node.host)
            again = [peer for peer in peers if not _reached(ways.get(peer.host), peer)]
            with ThreadPoolExecutor(_CALLERS) as callers:
                calls = callers.map(lambda peer: call_node(node.host, peer, clock=clock), again)
                ways |= {peer.host: (peer.nonce, way) for peer, way in zip(again, calls, strict=True)}
            missing = missing_hosts(here, needs.nodes, needs.hosts)
            if not missing and all(_reached(ways.get(peer.host), peer) for peer in peers):
                break
            if time.monotonic() - began >= wait_seconds:
                break
            time.sleep(_LOOK_SECONDS)
        own = Calls(
            host=node.host,
            nonce=node.nonce,
            seen={host: nonce for host, (nonce, _) in ways.items()},
            ways=tuple(way for _, way in ways.values()),
        )
        exchange.publish("calls", own.model_dump_json())
        # The listener stays until the others have called it.
        others = _wait_for_calls(exchange, here, node, began + wait_seconds + SHARE_SECONDS)
    return Record(
        here=node.host,
        nodes=here,
        missing_hosts=tuple(missing),
        doubles=tuple(sorted(doubles)),
        ways=(*own.ways, *(way for calls in others for way in calls.ways)),
        waited_seconds=time.monotonic() - began,
    )


def missing_hosts(here: Iterable[str], nodes: int, hosts: Sequence[str]) -> list[str]:
    """Names where they are known; a host may call itself by a longer or shorter name than the list does."""
    found = {name.split(".")[0] for name in here}
    if hosts:
        return [host for host in hosts if host.split(".")[0] not in found]
    return [f"node {number} of {nodes}" for number in range(len(found) + 1, nodes + 1)]


def _by_host(texts: Sequence[str], own: Node) -> tuple[dict[str, Node], set[str]]:
    """The nodes by name, and the names that two of them claim; facts that are damaged or half written are not there."""
    found: dict[str, Node] = {}
    doubles: set[str] = set()
    for text in texts:
        try:
            node = Node.model_validate_json(text)
        except ValidationError:
            continue
        if node.host in found or (node.host == own.host and node.nonce != own.nonce):
            doubles.add(node.host)
        found[node.host] = node
    return dict(sorted((found | {own.host: own}).items())), doubles


def _to_call(nodes: dict[str, Node], here: str) -> list[Node]:
    names = list(nodes)
    if len(names) <= ALL_PAIRS:
        return [nodes[name] for name in names if name != here]
    at = names.index(here)
    ring = {names[(at + step) % len(names)] for step in range(1, RING + 1)} | {names[0]}
    return [nodes[name] for name in sorted(ring - {here})]


def _reached(tried: tuple[str, Way] | None, peer: Node) -> bool:
    return tried is not None and tried[0] == peer.nonce and tried[1].error is None


def _wait_for_calls(exchange: Exchange, nodes: dict[str, Node], own: Node, end: float) -> list[Calls]:
    """Of all other nodes that had to do with this visit; those that say nothing until `end` are left out."""
    while True:
        found = []
        for text in exchange.read("calls"):
            with suppress(ValidationError):
                calls = Calls.model_validate_json(text)
                known = nodes.get(calls.host)
                # An earlier visit's calls were to an earlier nonce of ours.
                ours = calls.seen.get(own.host, own.nonce) == own.nonce
                if calls.host != own.host and known is not None and known.nonce == calls.nonce and ours:
                    found.append(calls)
        if len(found) >= len(nodes) - 1 or time.monotonic() >= end:
            return found
        time.sleep(_LOOK_SECONDS)
