"""Do the nodes fit each other: who came, versions, clocks, GPUs, and who reaches whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from disttrain.doctor.facts import Node, Record, Way
from disttrain.doctor.finding import Finding, Severity
from disttrain.doctor.needs import Needs
from disttrain.doctor.words import some, span

MUST_BE_EQUAL = ("torch", "disttrain", "disttrain code", "CUDA", "NCCL")
"""Ranks that differ in one of these run different collectives, or talk another protocol; others are only told."""
SKEW_SECONDS = 1.0


def check_arrival(record: Record, needs: Needs) -> list[Finding]:
    findings = []
    for host in record.doubles:
        what = f"two nodes call themselves {host}"
        findings.append(Finding("breaks", "arrival", what, (host,), "give each node a host name of its own"))
    if record.head_error is not None:
        what = f"the head {needs.head}:{needs.port} does not answer: {record.head_error} (waited {_waited(record)})"
        remedy = "start the head first, check its address and port, and that no firewall is between"
        findings.append(Finding("breaks", "arrival", what, (record.here,), remedy))
    for host in record.missing_hosts:
        what = f"{host} did not come within {_waited(record)}; here are {some(list(record.nodes))}"
        remedy = "look whether the doctor was started there and sees the same --share or head; --wait gives it longer"
        where = () if host.startswith("node ") else (host,)
        findings.append(Finding("breaks", "arrival", what, where, remedy))
    if not findings and len(record.nodes) > 1:
        findings.append(Finding("ok", "arrival", f"{len(record.nodes)} nodes came", tuple(record.nodes)))
    return findings


def check_versions(record: Record) -> list[Finding]:
    """Against what most nodes have; of equally many, against the first one."""
    nodes = record.nodes
    if len(nodes) < 2:
        only = nodes[record.here].versions if record.here in nodes else {}
        told = [
            f"{name} {version}" for name, version in only.items() if name in ("python", "torch", "CUDA", "disttrain")
        ]
        return [Finding("ok", "versions", ", ".join(told), (record.here,), figures=dict(only))]
    names = dict.fromkeys(name for node in nodes.values() for name in node.versions)
    findings = [finding for name in names for finding in _one_version(name, nodes)]
    return findings or [Finding("ok", "versions", "the same on all nodes", tuple(nodes))]


def _one_version(name: str, nodes: Mapping[str, Node]) -> list[Finding]:
    found = {host: node.versions.get(name, "none") for host, node in nodes.items()}
    (usual, count), *others = Counter(found.values()).most_common()
    findings = []
    for version, _ in others:
        hosts = tuple(host for host, own in found.items() if own == version)
        what = f"{name} is {version} on {some(hosts)}, and {usual} on {_nodes(count)}"
        remedy = f"install the same {'code' if name == 'disttrain code' else name} on all nodes"
        severity: Severity = "breaks" if name in MUST_BE_EQUAL or _minor(name, version, usual) else "warning"
        findings.append(Finding(severity, "versions", what, hosts, remedy, {"version": version, "usual": usual}))
    return findings


def _minor(name: str, version: str, usual: str) -> bool:
    """Python 3.11 and 3.12 cannot send each other functions; 3.11.4 and 3.11.7 can."""
    return name == "python" and version.split(".")[:2] != usual.split(".")[:2]


def check_gpus_alike(record: Record, needs: Needs) -> list[Finding]:
    kinds = {host: _cards(node) for host, node in record.nodes.items()}
    if len(set(kinds.values())) < 2 or needs.device == "cpu":
        return []
    (usual, count), *others = Counter(kinds.values()).most_common()
    findings = []
    for kind, _ in others:
        hosts = tuple(host for host, own in kinds.items() if own == kind)
        what = f"{some(hosts)}: {kind}, and {_nodes(count)} {'has' if count == 1 else 'have'} {usual}"
        findings.append(Finding("warning", "gpus", what, hosts, "the slowest or smallest card sets the pace of all"))
    return findings


def _cards(node: Node) -> str:
    counts = Counter(card.name for card in node.gpus.cards)
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "no GPU"


def check_clocks(record: Record, needs: Needs) -> list[Finding]:
    """Each against the first node, by the round trips of calls; what they can be wrong by speaks for the node."""
    if len(record.nodes) < 2:
        return []
    offsets = clock_offsets(record.ways, next(iter(record.nodes)))
    findings = []
    for host, (ahead, error) in offsets.items():
        sure = abs(ahead) - error
        if sure <= SKEW_SECONDS:
            continue
        severity: Severity = "breaks" if sure >= needs.stop_seconds else "warning"
        which = f"{'ahead of' if ahead > 0 else 'behind'} that of {next(iter(record.nodes))}"
        so = f": it would miss the end of its job, before which it begins to save {needs.stop_seconds:g} s"
        what = f"its clock is {span(abs(ahead))} {which} (± {span(error)}){so if severity == 'breaks' else ''}"
        figures = {"ahead_seconds": ahead, "error_seconds": error}
        findings.append(Finding(severity, "clock", what, (host,), "let chrony or ntpd set it", figures))
    if findings or not offsets:
        return findings
    largest = max((abs(ahead) for ahead, _ in offsets.values()), default=0.0)
    figures = {"largest_seconds": largest}
    return [Finding("ok", "clock", f"at most {span(largest)} apart", tuple(record.nodes), figures=figures)]


def clock_offsets(ways: Sequence[Way], first: str) -> dict[str, tuple[float, float]]:
    """How far each host's clock is ahead of the first one's, and what that can be wrong by: the best way tells."""
    found: dict[str, tuple[float, float]] = {}
    for way in ways:
        if way.clock_ahead_seconds is None or first not in (way.source, way.target):
            continue
        host = way.target if way.source == first else way.source
        ahead = way.clock_ahead_seconds if way.source == first else -way.clock_ahead_seconds
        if host not in found or way.clock_error_seconds < found[host][1]:
            found[host] = (ahead, way.clock_error_seconds)
    return found


def check_ways(record: Record) -> list[Finding]:
    """A node that several cannot reach, or that reaches none, is the one to leave out."""
    broken = [way for way in record.ways if way.error is not None]
    findings = []
    for way in broken:
        blame = blamed(way, record.ways, next(iter(record.nodes), ""))
        what = f"{way.source} does not reach {way.target} ({way.address}): {way.error}"
        back = next((w for w in record.ways if (w.source, w.target) == (way.target, way.source)), None)
        what += "; the other way is open" if back is not None and back.error is None else ""
        remedy = "open all ports between the nodes (32768-60999 at least), both ways; is the interface the right one?"
        findings.append(Finding("breaks", "reach", what, (blame,), remedy))
    if findings or not record.ways:
        return findings
    slowest = max(record.ways, key=lambda way: way.connect_seconds or 0.0)
    longest = slowest.connect_seconds or 0.0
    what = (
        f"{len(record.ways)} ways open; the slowest answer took {span(longest)} ({slowest.source} to {slowest.target})"
    )
    return [Finding("ok", "reach", what, tuple(record.nodes), figures={"slowest_seconds": longest})]


def blamed(way: Way, ways: Sequence[Way], first: str) -> str:
    """Which end of a broken way has more broken ones; of equal ends the one that is not the first node."""
    counts = Counter(end for each in ways if each.error is not None for end in (each.source, each.target))
    if counts[way.source] != counts[way.target]:
        return max((way.source, way.target), key=lambda end: counts[end])
    return way.source if way.target == first else way.target


def _waited(record: Record) -> str:
    return f"{record.waited_seconds:.0f} s"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"
