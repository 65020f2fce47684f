"""Interfaces, names and routes of this machine. Nothing is sent but questions to the resolver."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

from disttrain.distributed.env import read_variables
from disttrain.distributed.network import (
    ELSEWHERE,
    SOCKET_VARIABLES,
    interface_addresses,
    interface_of,
    named_interfaces,
    source_address,
)
from disttrain.doctor.facts import Interface, Network, Route
from disttrain.doctor.nvidia import infiniband
from disttrain.doctor.reach import tcp_problem

HEAD_SECONDS = 5.0


def gather_network(head: str | None, port: int | None, hosts: Sequence[str], head_is_open: bool = False) -> Network:
    """`head_is_open`: a launcher listens on the head already, so that its port is rightly taken."""
    interfaces = gather_interfaces()
    name = socket.gethostname()
    addresses, problem = resolve(name)
    route = find_route(head, interfaces) if head else None
    here = route is not None and route.address is not None and route.address in own_addresses(interfaces)
    callable_head = route is not None and route.error is None and port is not None and not here and not head_is_open
    return Network(
        interfaces=interfaces,
        host_name=name,
        host_addresses=addresses,
        host_name_error=problem,
        route=route,
        unresolved={host: why for host in hosts if (why := resolve(host)[1]) is not None},
        variables=read_variables(SOCKET_VARIABLES),
        head_error=head_problem(route.address, port) if callable_head and route and port else None,
        port_taken=port_problem(route.address, port) if here and route and port and not head_is_open else None,
        infiniband=infiniband(),
    )


def gather_interfaces() -> tuple[Interface, ...]:
    states = psutil.net_if_stats()
    return tuple(
        Interface(
            name=name,
            up=bool((state := states.get(name)) and state.isup),
            addresses=tuple(addresses),
            mtu=state.mtu if state else 0,
            speed_mbit=state.speed if state else 0,
        )
        for name, addresses in sorted(interface_addresses().items())
    )


def resolve(name: str) -> tuple[tuple[str, ...], str | None]:
    """Addresses, or the resolver's reason."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return (), str(getattr(error, "strerror", None) or error)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found)), None


def find_route(head: str, interfaces: Sequence[Interface]) -> Route:
    """The way that packets would take, or why there is none."""
    addresses, problem = resolve(head)
    if problem is not None:
        return Route(head=head, error=f"the name does not resolve: {problem}")
    address = next((text for text in addresses if ":" not in text), addresses[0])
    try:
        source = source_address(address)
    except OSError as error:
        return Route(head=head, address=address, error=error.strerror)
    interface = interface_of(source, {each.name: each.addresses for each in interfaces})
    return Route(head=head, address=address, source=source, interface=interface)


def own_addresses(interfaces: Sequence[Interface]) -> set[str]:
    return {address for interface in interfaces for address in interface.addresses}


def head_problem(address: str | None, port: int) -> str | None:
    """A refusal comes from the head itself, and shows that the way is open."""
    problem = tcp_problem(address or "", port, HEAD_SECONDS)
    return None if problem == os.strerror(errno.ECONNREFUSED) else problem


def port_problem(address: str | None, port: int) -> str | None:
    """Why nobody could listen there now; None where somebody could."""
    family = socket.AF_INET6 if ":" in (address or "") else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address or "", port))
        except OSError as error:
            return error.strerror
    return None


def listening_address(network: Network) -> str:
    """Where others reach this node: on the interface that is named, on the way to the head, or on the default route."""
    if network.route is not None and network.route.source is not None:
        return network.route.source
    for address in (*_of_named(network.variables, network.interfaces), *network.host_addresses):
        if not ipaddress.ip_address(address).is_loopback and address in own_addresses(network.interfaces):
            return address
    with suppress(OSError):
        return source_address(ELSEWHERE)
    outside = [address for each in network.interfaces if each.up for address in each.addresses]
    return next((address for address in outside if not ipaddress.ip_address(address).is_loopback), "127.0.0.1")


def _of_named(variables: Mapping[str, str], interfaces: Sequence[Interface]) -> list[str]:
    return [
        address
        for variable, value in variables.items()
        for name in named_interfaces(variable, value, [each.name for each in interfaces])
        for interface in interfaces
        if interface.name == name and interface.up
        for address in interface.addresses
    ]
