"""Interfaces, names and the way to the head: made-up networks, and this machine's own."""

from __future__ import annotations

import socket

import pytest

from disttrain.distributed.network import named_interfaces
from disttrain.doctor.check_network import check_network
from disttrain.doctor.facts import Interface, Network, Route
from disttrain.doctor.needs import Needs
from disttrain.doctor.network import (
    find_route,
    gather_interfaces,
    gather_network,
    head_problem,
    listening_address,
    port_problem,
    resolve,
)
from tests.doctor.made_up import ETH, LO, healthy, only

TWO = Needs(nodes=2, head="h", port=29500)
IB = Interface(name="ib0", addresses=("10.9.0.1",))
DOWN = Interface(name="eth1", up=False, addresses=("10.7.0.1",))
BARE = Interface(name="eth2")
TO_HEAD = Route(head="h", address="10.0.0.9", source="10.0.0.1", interface="eth0")


def network(**changed: object) -> Network:
    facts: dict[str, object] = {
        "interfaces": (ETH, LO, IB, DOWN, BARE),
        "host_name": "a",
        "host_addresses": ("10.0.0.1",),
        "route": TO_HEAD,
    }
    return Network(**(facts | changed))  # type: ignore[arg-type]


def test_a_network_that_is_well() -> None:
    (finding,) = check_network(healthy(network=network()), TWO)
    assert (finding.severity, finding.what) == ("ok", "the way to the head h (10.0.0.9) is eth0, from 10.0.0.1")


@pytest.mark.parametrize(
    ("variable", "value", "severity", "said"),
    [
        ("GLOO_SOCKET_IFNAME", "eth9", "breaks", "no such interface here; there are eth0, lo, ib0, eth1, eth2"),
        ("NCCL_SOCKET_IFNAME", "enp", "breaks", "no such interface"),
        ("GLOO_SOCKET_IFNAME", "eth1", "breaks", "eth1 is down"),
        ("GLOO_SOCKET_IFNAME", "eth2", "breaks", "eth2 is without an address"),
        ("GLOO_SOCKET_IFNAME", "lo", "breaks", "loopback interface leads to no other of the 2 nodes"),
        ("GLOO_SOCKET_IFNAME", "ib0", "warning", "but the way to the head h is eth0"),
    ],
)
def test_a_named_interface(variable: str, value: str, severity: str, said: str) -> None:
    found = only(check_network(healthy(network=network(variables={variable: value})), TWO), severity)
    assert said in found.what
    assert found.remedy == f"{variable}=eth0, or unset it"


@pytest.mark.parametrize("value", ["eth0", "eth0,ib0"])
def test_the_right_interface(value: str) -> None:
    assert check_network(healthy(network=network(variables={"GLOO_SOCKET_IFNAME": value})), TWO)[0].severity == "ok"


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("eth", ["eth0", "eth1", "eth2"]),
        ("=eth", []),
        ("=eth0", ["eth0"]),
        ("^eth,lo", ["ib0"]),
        ("^=ib0,lo", ["eth0", "eth1", "eth2"]),
    ],
)
def test_nccl_takes_prefixes(value: str, names: list[str]) -> None:
    assert named_interfaces("NCCL_SOCKET_IFNAME", value, [each.name for each in network().interfaces]) == names


@pytest.mark.parametrize(
    "changed",
    [{"host_addresses": (), "host_name_error": "Name or service not known"}, {"host_addresses": ("127.0.1.1",)}],
)
def test_a_host_name_that_leads_nowhere(changed: dict[str, object]) -> None:
    """gloo would tell the others 127.0.0.1, unless it is told an interface."""
    found = only(check_network(healthy(network=network(**changed)), TWO))
    assert "/etc/hosts, or set GLOO_SOCKET_IFNAME=eth0" in found.remedy
    told = network(**changed, variables={"GLOO_SOCKET_IFNAME": "eth0"})
    assert "breaks" not in {each.severity for each in check_network(healthy(network=told), TWO)}
    assert "breaks" not in {each.severity for each in check_network(healthy(network=network(**changed)), Needs())}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"route": Route(head="h", error="the name does not resolve: unknown")}, "no way to the head h: the name"),
        ({"route": Route(head="h", address="9.9.9.9", error="Network is unreachable")}, "(9.9.9.9): Network is"),
        ({"route": Route(head="h", address="127.0.0.1", source="127.0.0.1", interface="lo")}, "this node itself"),
        ({"head_error": "no answer within 5 s"}, "port 29500 of the head h (10.0.0.9) cannot be called: no answer"),
        ({"port_taken": "Address already in use"}, "port 29500 on the head cannot be opened: Address already in use"),
    ],
)
def test_a_head_that_cannot_be_had(changed: dict[str, object], said: str) -> None:
    assert said in only(check_network(healthy(network=network(**changed)), TWO)).what


def test_other_names_are_only_noted() -> None:
    unresolved = {"b": "unknown", "c": "unknown"}
    found = only(check_network(healthy(network=network(unresolved=unresolved)), TWO), "note")
    assert "b, c (unknown)" in found.what


def test_this_machine() -> None:
    interfaces = gather_interfaces()
    (loopback,) = [each for each in interfaces if each.name == "lo"]
    assert loopback.up
    assert "127.0.0.1" in loopback.addresses
    route = find_route("127.0.0.1", interfaces)
    assert (route.source, route.interface, route.error) == ("127.0.0.1", "lo", None)
    assert "does not resolve" in (find_route("no such host.invalid", interfaces).error or "")
    assert resolve("127.0.0.1") == (("127.0.0.1",), None)


def test_where_a_node_listens() -> None:
    assert listening_address(network()) == "10.0.0.1"
    assert listening_address(network(route=None, variables={"GLOO_SOCKET_IFNAME": "ib0"})) == "10.9.0.1"
    assert listening_address(network(route=None, host_addresses=("10.9.0.1",))) == "10.9.0.1"


def test_a_port_that_is_taken_and_one_that_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port_problem("127.0.0.1", port) == "Address already in use"
        assert gather_network("127.0.0.1", port, []).port_taken == "Address already in use"
        assert gather_network("127.0.0.1", port, [], head_is_open=True).port_taken is None
        assert head_problem("127.0.0.1", port) is None
    assert port_problem("127.0.0.1", port) is None
    # Nobody listens before a run begins; the refusal shows that the head is there.
    assert head_problem("127.0.0.1", port) is None
    assert head_problem("no such host.invalid", port) is not None
