"""What the ranks have measured: right results, the slowest link, the slowest rank, and who gave none."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from disttrain.doctor.facts import Collective, Link, Rank, Record
from disttrain.doctor.finding import Finding
from disttrain.doctor.words import rate, some, span

SLOW_LINK = 0.5
"""A link below this share of what links of its kind usually give is slow."""
SLOW_RANK = 1.5
"""A rank that takes so many times what most take is slow; all others wait for it in every step."""
LEAST_BETWEEN_NODES = 100e6
"""Bytes per second: below gigabit Ethernet the gradients of any model take longer than its steps."""


def check_ranks(record: Record) -> list[Finding]:
    if record.not_measured is not None:
        return [*_missing(record), Finding("note", "ranks", f"no figures from the ranks: {record.not_measured}")]
    hosts = {rank.rank: rank.host for rank in record.ranks}
    findings = [*_missing(record), *_failed(record.ranks), *_wrong(record.ranks, hosts)]
    if not record.ranks:
        return findings
    if not findings:
        findings.append(_right(record.ranks))
    links = [link for rank in record.ranks for link in rank.links]
    return [*findings, *check_links(links, hosts), *check_speed(record.ranks)]


def _missing(record: Record) -> list[Finding]:
    findings = []
    for rank, seen in sorted(record.missing_ranks.items()):
        host = seen.partition(":")[0] if ":" in seen else ""
        what = f"rank {rank} gave no result: {seen or 'it never came'}"
        remedy = "look at that process and its node: stopped, out of memory, or still importing?"
        findings.append(Finding("breaks", "ranks", what, (host,) if host else (), remedy))
    return findings


def _failed(ranks: Sequence[Rank]) -> list[Finding]:
    """All fail when one does not come: those who say nothing are to blame, where there are any."""
    findings = []
    for rank in ranks:
        if rank.failed is not None:
            what = f"rank {rank.rank} failed {rank.failed}"
            remedy = "see what is said of the network and of the other ranks; GLOO_SOCKET_IFNAME, NCCL_DEBUG=INFO"
            findings.append(Finding("breaks", "ranks", what, remedy=remedy))
    return findings


def _wrong(ranks: Sequence[Rank], hosts: dict[int, str]) -> list[Finding]:
    """Wrong numbers, and the rank that most of them come from or come to."""
    wrong = [(rank, each) for rank in ranks for each in rank.collectives if each.wrong_elements]
    links = [link for rank in ranks for link in rank.links if link.wrong_elements]
    if not wrong and not links:
        return []
    source = _source_of_wrong(wrong, links)
    elements = sum(each.wrong_elements for _, each in wrong) + sum(link.wrong_elements for link in links)
    error = max((each.max_error for _, each in wrong), default=0.0)
    names = list(dict.fromkeys(each.name for _, each in wrong)) + (["send and receive"] if links else [])
    at = f"rank {source} on {hosts.get(source, '?')}" if source is not None else "several ranks"
    what = f"wrong results of {', '.join(names)}: {elements:,} elements, off by up to {error:.3g}; {at} is to blame"
    remedy = "leave the node out: memory, link or driver change what they carry; no run on it can be trusted"
    figures = {"wrong_elements": elements, "max_error": error, "rank": source}
    return [Finding("breaks", "collectives", what, (hosts[source],) if source in hosts else (), remedy, figures)]


def _source_of_wrong(wrong: Sequence[tuple[Rank, Collective]], links: Sequence[Link]) -> int | None:
    """Who sends wrong parts, or else who alone ends up with wrong sums."""
    senders = Counter(sender for rank, each in wrong for sender in each.wrong_from if sender != rank.rank)
    senders.update(link.sender for link in links)
    receivers = Counter(rank.rank for rank, _ in wrong)
    receivers.update(link.receiver for link in links)
    if senders and len(receivers) > 1:
        return senders.most_common(1)[0][0]
    return receivers.most_common(1)[0][0] if len(receivers) == 1 else None


def _right(ranks: Sequence[Rank]) -> Finding:
    results = [each for rank in ranks for each in rank.collectives]
    names = list(dict.fromkeys(each.name for each in results))
    speeds = [each.bus_bytes_per_second for each in results if each.bus_bytes_per_second]
    bus = min(speeds) if speeds else None
    elements = sum(each.elements for each in results)
    what = f"{', '.join(names)} on {len(ranks)} ranks ({ranks[0].backend}): {elements:,} elements, none wrong"
    what += f"; all_reduce bus bandwidth {rate(bus)}" if bus else ""
    figures = {"wrong_elements": 0, "max_error": 0.0, "bus_bytes_per_second": bus}
    return Finding("ok", "collectives", what, figures=figures)


def check_links(links: Sequence[Link], hosts: dict[int, str]) -> list[Finding]:
    """Links inside a node and between nodes are compared with their own kind."""
    inside = [link for link in links if hosts.get(link.sender) == hosts.get(link.receiver)]
    between = [link for link in links if link not in inside]
    return [*_kind_of_links(between, hosts, "between nodes"), *_kind_of_links(inside, hosts, "inside a node")]


def _kind_of_links(links: Sequence[Link], hosts: dict[int, str], kind: str) -> list[Finding]:
    if not links:
        return []
    usual = sorted(link.bytes_per_second for link in links)[len(links) // 2]
    slowest = min(links, key=lambda link: link.bytes_per_second)
    floor = LEAST_BETWEEN_NODES if kind == "between nodes" else 0.0
    # Two ranks of one machine have but one link, and nothing to compare it with.
    share = SLOW_LINK if floor or len(links) > 2 else 0.0
    slow = [link for link in links if link.bytes_per_second < max(share * usual, floor)]
    figures = {
        "slowest_bytes_per_second": slowest.bytes_per_second,
        "usual_bytes_per_second": usual,
        "latency_seconds": statistics.median(link.latency_seconds for link in links),
        "sender": slowest.sender,
        "receiver": slowest.receiver,
    }
    worst = f"{_link(slowest, hosts)} {rate(slowest.bytes_per_second)} (latency {span(slowest.latency_seconds)})"
    if not slow:
        what = f"{len(links)} links {kind}, usually {rate(usual)}; the slowest: {worst}"
        return [Finding("ok", "links", what, figures=figures)]
    ends = [{hosts.get(link.sender, "?"), hosts.get(link.receiver, "?")} for link in slow]
    common = sorted(set.intersection(*ends))
    what = f"slow {kind}: {worst}, {slowest.bytes_per_second / usual:.2f} x the usual {rate(usual)}"
    if len(slow) > 1:
        what += f"; {len(slow)} of {len(links)} links are slow" + (f", all at {common[0]}" if len(common) == 1 else "")
    cause = "cable, negotiated speed, a shared uplink, the wrong interface (GLOO_, NCCL_SOCKET_IFNAME)"
    remedy = f"look at that link: {cause if floor else 'PCIe or NVLink, other processes on the same cores'}"
    return [Finding("warning", "links", what, tuple(common or sorted(set.union(*ends))), remedy, figures)]


def check_speed(ranks: Sequence[Rank]) -> list[Finding]:
    timed = [(rank.compute_seconds, rank) for rank in ranks if rank.compute_seconds is not None]
    if not timed:
        return []
    seconds, slowest = max(timed, key=lambda pair: pair[0])
    usual = sorted(each for each, _ in timed)[(len(timed) - 1) // 2]
    ratio = seconds / usual
    share = slowest.compute_cpu_share
    figures = {"rank": slowest.rank, "seconds": seconds, "usual_seconds": usual, "ratio": ratio, "cpu_share": share}
    name = f"rank {slowest.rank} on {slowest.host}"
    if ratio <= SLOW_RANK:
        what = f"the same computation took {span(usual)}; slowest {name}, {ratio:.2f} x"
        return [Finding("ok", "speed", what, _hosts(rank for _, rank in timed), figures=figures)]
    slow = [rank.rank for each, rank in timed if each > SLOW_RANK * usual]
    why = f"; it had {100 * share:.0f} % of a core" if share is not None and slowest.device == "cpu" else ""
    what = f"{name} is slow: {span(seconds)}, {ratio:.1f} x the usual {span(usual)}{why}"
    what += f" (slow ranks: {some([str(rank) for rank in slow])})" if len(slow) > 1 else ""
    remedy = "all wait for it in every step: look for other processes, a lower clock, heat; or leave the node out"
    return [Finding("warning", "speed", what, (slowest.host,), remedy, figures)]


def _link(link: Link, hosts: dict[int, str]) -> str:
    def end(rank: int) -> str:
        return f"rank {rank} ({hosts.get(rank, '?')})"

    return f"{end(link.sender)} to {end(link.receiver)}"


def _hosts(ranks: Iterable[Rank]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rank.host for rank in ranks))
