"""Can this node talk to the others: the interface that is named, the host's name, the way to the head."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from disttrain.distributed.network import named_interfaces
from disttrain.doctor.facts import Interface, Node
from disttrain.doctor.finding import Finding, Severity
from disttrain.doctor.needs import Needs
from disttrain.doctor.words import some


def check_network(node: Node, needs: Needs) -> list[Finding]:
    findings = [*_variables(node, needs), *_host_name(node, needs), *_head(node, needs), *_others(node)]
    if any(finding.severity in ("warning", "breaks") for finding in findings):
        return findings
    route = node.network.route
    if route is None or route.interface is None:
        interfaces = [each.name for each in node.network.interfaces if each.up and not _is_loopback(each)]
        return [*findings, Finding("ok", "network", f"interfaces {some(interfaces) or 'lo only'}", (node.host,))]
    what = f"the way to the head {route.head} ({route.address}) is {route.interface}, from {route.source}"
    return [*findings, Finding("ok", "network", what, (node.host,))]


def _variables(node: Node, needs: Needs) -> list[Finding]:
    findings = []
    for variable, value in node.network.variables.items():
        names = named_interfaces(variable, value, [each.name for each in node.network.interfaces])
        found = [each for each in node.network.interfaces if each.name in names]
        if (problem := _problem(variable, value, found, node, needs)) is not None:
            severity, what = problem
            remedy = f"{variable}={_better(node)}, or unset it"
            findings.append(Finding(severity, "network", what, (node.host,), remedy))
    return findings


def _problem(
    variable: str, value: str, found: Sequence[Interface], node: Node, needs: Needs
) -> tuple[Severity, str] | None:
    names = [each.name for each in node.network.interfaces]
    if not found:
        return "breaks", f"{variable}={value}: there is no such interface here; there are {some(names, 8)}"
    usable = [each for each in found if each.up and each.addresses]
    if not usable:
        return "breaks", f"{variable}={value}: {found[0].name} is {'without an address' if found[0].up else 'down'}"
    if needs.nodes > 1 and all(_is_loopback(each) for each in usable):
        return "breaks", f"{variable}={value}: the loopback interface leads to no other of the {needs.nodes} nodes"
    route = node.network.route
    if route is None or route.interface is None or _is_own(node, route.address):
        return None
    if route.interface not in [each.name for each in usable]:
        return "warning", f"{variable}={value}, but the way to the head {route.head} is {route.interface}"
    return None


def _host_name(node: Node, needs: Needs) -> list[Finding]:
    """gloo announces the address that the machine's own name resolves to, unless an interface is named."""
    network = node.network
    alone = needs.nodes < 2 or "GLOO_SOCKET_IFNAME" in network.variables
    remedy = f"put it into /etc/hosts, or set GLOO_SOCKET_IFNAME={_better(node)}"
    if network.host_name_error is not None:
        what = f"the host name {network.host_name} does not resolve here: {network.host_name_error}"
        return [Finding("note" if alone else "breaks", "network", what, (node.host,), remedy)]
    loopback = [text for text in network.host_addresses if _loopback_text(text)]
    if not alone and loopback and len(loopback) == len(network.host_addresses):
        what = f"the host name {network.host_name} resolves to {loopback[0]} here, which gloo would tell the others"
        return [Finding("breaks", "network", what, (node.host,), remedy)]
    return []


def _head(node: Node, needs: Needs) -> list[Finding]:
    route, where, findings = node.network.route, (node.host,), []
    if route is not None and route.error is not None:
        what = f"no way to the head {route.head}{f' ({route.address})' if route.address else ''}: {route.error}"
        remedy = "name the head by an address that this node knows (--head, MASTER_ADDR), or repair its routes"
        findings.append(Finding("breaks", "network", what, where, remedy))
    elif route is not None and needs.nodes > 1 and route.address is not None and _loopback_text(route.address):
        what = f"the head {route.head} is {route.address} here, this node itself: no other node can come there"
        findings.append(Finding("breaks", "network", what, where, "name the head by its address on the network"))
    if node.network.head_error is not None and route is not None:
        what = (
            f"port {needs.port} of the head {route.head} ({route.address}) cannot be called: {node.network.head_error}"
        )
        remedy = f"is the head up, and is {route.interface} the right way to it? A firewall may be between"
        findings.append(Finding("breaks", "network", what, where, remedy, {"port": needs.port}))
    if node.network.port_taken is not None:
        what = f"port {needs.port} on the head cannot be opened: {node.network.port_taken}"
        remedy = "another job uses it: take a port that follows from the job's id, or end that job"
        findings.append(Finding("breaks", "network", what, where, remedy, {"port": needs.port}))
    return findings


def _others(node: Node) -> list[Finding]:
    if not (unresolved := node.network.unresolved):
        return []
    why = next(iter(unresolved.values()))
    what = f"names that do not resolve here: {some(list(unresolved))} ({why})"
    return [Finding("note", "network", what, (node.host,), "put them into /etc/hosts where something uses these names")]


def _better(node: Node) -> str:
    """The interface that leads to the head, or a likely one."""
    if node.network.route is not None and node.network.route.interface is not None:
        return node.network.route.interface
    likely = [each.name for each in node.network.interfaces if each.up and each.addresses and not _is_loopback(each)]
    return likely[0] if likely else "lo"


def _is_own(node: Node, address: str | None) -> bool:
    return any(address in each.addresses for each in node.network.interfaces)


def _is_loopback(interface: Interface) -> bool:
    return bool(interface.addresses) and all(_loopback_text(text) for text in interface.addresses)


def _loopback_text(text: str) -> bool:
    return ipaddress.ip_address(text).is_loopback
