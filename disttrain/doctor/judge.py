"""All checks over all facts, and the hosts to leave out of the next run."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from disttrain.doctor.check_gpus import check_gpus
from disttrain.doctor.check_machine import check_disk, check_limits, check_packages, check_shared_memory
from disttrain.doctor.check_network import check_network
from disttrain.doctor.check_nodes import check_arrival, check_clocks, check_gpus_alike, check_versions, check_ways
from disttrain.doctor.check_ranks import check_ranks
from disttrain.doctor.facts import Record
from disttrain.doctor.finding import Finding, failing_hosts
from disttrain.doctor.needs import Needs

NODE_CHECKS = (check_limits, check_shared_memory, check_disk, check_packages, check_gpus, check_network)


def judge(record: Record, needs: Needs) -> list[Finding]:
    """The findings in the order of the checks. The same facts give the same findings on every node."""
    return [
        *check_arrival(record, needs),
        *check_versions(record),
        *check_clocks(record, needs),
        *(finding for check in NODE_CHECKS for node in record.nodes.values() for finding in check(node, needs)),
        *check_gpus_alike(record, needs),
        *check_ways(record),
        *check_ranks(record),
    ]


def responsible_for(record: Record, findings: Sequence[Finding], alone: bool) -> set[str]:
    """Whose lines this node writes into the list: `alone`, where one speaks for all, everybody's.

    Where each node speaks, it has seen more of itself than the others have: its own line, and the first node writes
    those of hosts that did not come.
    """
    failing = set(failing_hosts(findings))
    if alone:
        return failing | set(record.nodes)
    first = record.here == next(iter(record.nodes))
    return {record.here} | (failing - set(record.nodes) if first else set())


def write_failing_nodes(file: Path, examined: Iterable[str], findings: Sequence[Finding]) -> list[str]:
    """One host per line; lines about hosts that were not examined stay. Returns the lines. OSError where it refuses.

    A file is made only when there is something to put into it: nodes that are examined one by one share it.
    """
    examined = set(examined)
    failing = [host for host in failing_hosts(findings) if host in examined]
    if not failing and not file.exists():
        return []
    with file.open("a+", encoding="utf-8") as lines:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lines, fcntl.LOCK_EX)
        lines.seek(0)
        kept = {line.strip() for line in lines if line.strip()} - examined
        together = sorted(kept | set(failing))
        lines.truncate(0)
        lines.write("".join(f"{host}\n" for host in together))
    return together
