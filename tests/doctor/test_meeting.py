"""Nodes that meet in a folder: threads of one process, each a node with a listener of its own on the loopback."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from disttrain.doctor.check_nodes import check_clocks
from disttrain.doctor.facts import Network, Node, Record, Route
from disttrain.doctor.meeting import ALL_PAIRS, FolderExchange, _to_call, meet, missing_hosts
from disttrain.doctor.needs import Needs
from disttrain.doctor.reach import Listener, call_node, tcp_problem, wait_for_port
from tests.doctor.made_up import only

LOOPBACK = Network(route=Route(head="h", address="127.0.0.1", source="127.0.0.1", interface="lo"))


def node(host: str, nonce: str = "") -> Node:
    return Node(host=host, nonce=nonce or secrets.token_hex(4), network=LOOPBACK)


def meeting(folder: Path, *hosts: str, wait: float = 20.0, clocks: dict[str, float] | None = None) -> list[Record]:
    """What each of the hosts gets to know."""

    def visit(host: str) -> Record:
        exchange = FolderExchange(folder, host, wait)
        return meet(exchange, node(host), Needs(nodes=len(hosts)), wait, (clocks or {}).get(host, 0.0))

    with ThreadPoolExecutor(len(hosts)) as nodes:
        return list(nodes.map(visit, hosts))


def test_three_nodes_meet(tmp_path: Path) -> None:
    for record in meeting(tmp_path, "c", "a", "b"):
        assert list(record.nodes) == ["a", "b", "c"]
        assert sorted((way.source, way.target) for way in record.ways if way.error is None) == [
            (source, target) for source in "abc" for target in "abc" if source != target
        ]
        assert (record.missing_hosts, record.doubles) == ((), ())


def test_a_clock_that_is_off_is_seen_by_all(tmp_path: Path) -> None:
    for record in meeting(tmp_path, "a", "b", clocks={"b": 300.0}):
        found = only(check_clocks(record, Needs(nodes=2)))
        assert found.where == ("b",)
        assert found.what.startswith("its clock is 300 s ahead of that of a")


def test_who_does_not_come_is_named_when_the_time_is_over(tmp_path: Path) -> None:
    exchange = FolderExchange(tmp_path, "a.cluster", 0.3)
    record = meet(exchange, node("a.cluster"), Needs(nodes=3, hosts=("a", "b", "c.cluster")), 0.3)
    assert record.missing_hosts == ("b", "c.cluster")
    assert missing_hosts(["a"], 3, ()) == ["node 2 of 3", "node 3 of 3"]


def test_what_an_earlier_visit_left_does_not_count(tmp_path: Path) -> None:
    old = tmp_path / "b.facts.json"
    old.write_text(node("b", "earlier").model_dump_json())
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    record = meet(FolderExchange(tmp_path, "a", 0.3), node("a"), Needs(nodes=2), 0.3)
    assert list(record.nodes) == ["a"]


def test_what_a_visit_left_a_moment_ago_is_replaced(tmp_path: Path) -> None:
    """Both sets of files are young; only the nodes that answer now are the ones."""
    meeting(tmp_path, "a", "b")
    for record in meeting(tmp_path, "a", "b"):
        assert all(way.error is None for way in record.ways)
        assert len(record.ways) == 2


def test_damaged_facts_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "b.facts.json").write_text('{"host": "b", "nonce": ')
    (tmp_path / "c.facts.json").write_bytes(b"\xff\x00")
    record = meet(FolderExchange(tmp_path, "a", 0.3), node("a"), Needs(nodes=3, hosts=("a", "b", "c")), 0.3)
    assert record.missing_hosts == ("b", "c")


def test_facts_of_another_version_are_understood() -> None:
    theirs = Node.model_validate_json('{"host": "b", "versions": {"disttrain": "9.0"}, "invented": [1]}')
    assert (theirs.versions, theirs.limits.open_files) == ({"disttrain": "9.0"}, None)


def test_two_nodes_of_one_name(tmp_path: Path) -> None:
    class Crowd(FolderExchange):
        def read(self, kind: str) -> list[str]:
            return [*super().read(kind), *([node("a", "another").model_dump_json()] if kind == "facts" else [])]

    record = meet(Crowd(tmp_path, "a", 0.2), node("a"), Needs(), 0.2)
    assert record.doubles == ("a",)


def test_thousands_of_nodes_call_their_neighbours() -> None:
    nodes = {f"n{number:04}": node(f"n{number:04}") for number in range(1000)}
    called = [peer.host for peer in _to_call(nodes, "n0999")]
    assert called == ["n0000", *(f"n{number:04}" for number in range(1, 8))]
    few = dict(list(nodes.items())[:ALL_PAIRS])
    assert len(_to_call(few, "n0000")) == ALL_PAIRS - 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"SSH-2.0-x\r\n", None), (b'{"nonce": "of another", "unix_seconds": 1}', "somebody else answers there")],
)
def test_somebody_else_on_that_port(answer: bytes, said: str | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as helper:

        def serve() -> None:
            caller, _ = server.accept()
            with caller:
                caller.sendall(answer)

        helper.submit(serve)
        way = call_node("a", node("b").model_copy(update={"listens": server.getsockname()}))
    assert way.error is not None
    assert said is None or way.error == said


def test_nobody_answers_a_call() -> None:
    with Listener("127.0.0.1", "n") as listener:
        place = listener.place
    gone = node("b").model_copy(update={"listens": place})
    assert call_node("a", gone).error == "Connection refused"
    assert call_node("a", node("b")).error == "it does not listen"
    assert tcp_problem(*place, 1.0) == wait_for_port(*place, 0.1) == "Connection refused"


def test_a_listener_that_hangs_does_not_hold_anybody_up() -> None:
    """It takes the call, as the kernel does for a stopped process, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        way = call_node("a", node("b").model_copy(update={"listens": silent.getsockname()}), seconds=0.2)
    assert way.error == "no answer within 0.2 s"


def clock_of(seconds: float) -> Callable[[], float]:
    return lambda: seconds


def test_clocks_are_compared_from_the_middle_of_the_round_trip() -> None:
    times = iter([100.0, 102.0, 200.0, 200.5, 300.0, 301.0])
    with Listener("127.0.0.1", "n", clock_of(250.25)) as listener:
        peer = node("b", "n").model_copy(update={"listens": listener.place})
        way = call_node("a", peer, clock=lambda: next(times))
    assert (way.clock_ahead_seconds, way.clock_error_seconds) == (50.0, 0.25)
