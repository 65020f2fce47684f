"""Who holds up the others: pure functions over what the ranks wrote down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Whereabouts:
    """Where one rank is."""

    rank: int
    host: str
    process: int
    step: int
    phase: str
    seconds: float
    """For how long it has been there."""
    collective: tuple[int, str] | None
    """Number and name of the last collective that it entered."""
    stack: list[str]
    """Of its main thread, innermost call last."""


_PEERS_ARE_GONE = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")


def lost_peers(error: BaseException | None) -> bool:
    """Whether a collective failed because another rank is no longer there: then this rank has nothing to say itself."""
    return any(sign in str(error) for sign in _PEERS_ARE_GONE)


def last_collective(record: Mapping[str, Any]) -> tuple[int, str] | None:
    """From torch's flight record; its own state of a collective is not to be relied on under gloo. Each group counts
    its own collectives; only the sum over a rank's groups can be compared with other ranks'."""
    entries = [entry for entry in record.get("entries", []) if entry.get("collective_seq_id")]
    if not entries:
        return None
    last = max(entries, key=lambda entry: (entry.get("time_created_ns", 0), entry["collective_seq_id"]))
    entered: dict[str, int] = {}
    for entry in entries:
        group = str(entry.get("process_group"))
        entered[group] = max(entered.get(group, 0), entry["collective_seq_id"])
    return sum(entered.values()), str(last.get("profiling_name", "a collective"))


def read_whereabouts(folder: Path, since: float = 0.0) -> dict[int, Whereabouts]:
    """Written at or after `since` (Unix time), by rank."""
    found = {}
    for path in folder.glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            if path.stat().st_mtime < since:
                continue
            content = json.loads(path.read_text(encoding="utf-8"))
            collective = content["collective"]
            one = Whereabouts(**content | {"collective": tuple(collective) if collective else None})
            found[one.rank] = one
    return found


def accuse(found: Mapping[int, Whereabouts], world: int) -> str:
    """One line: who is to blame, and why. `found` has at least one account.

    A rank that says nothing is stopped, or computes without ever letting Python run; one that has entered fewer
    collectives than the others is what they wait for; one in another collective has left the common order.
    """
    silent = sorted(set(range(world)) - set(found))
    step = max(one.step for one in found.values())
    head = f"no progress in step {step} for {max(one.seconds for one in found.values()):.0f} s: "
    if silent:
        who = (
            f"ranks {', '.join(map(str, silent))} of {world} do"
            if len(silent) > 1
            else f"rank {silent[0]} of {world} does"
        )
        return f"{head}{who} not answer at all (stopped, or out of Python's reach)"
    known = {rank: one.collective for rank, one in found.items() if one.collective is not None}
    if len(known) < len(found) or not known:
        return f"{head}nobody is behind as far as can be seen; {_places(found)}"
    most = max(number for number, _ in known.values())
    behind = {rank: number for rank, (number, _) in known.items() if number < most}
    if behind:
        rank = min(behind, key=lambda rank: (behind[rank], rank))
        one = found[rank]
        return (
            f"{head}rank {rank} on {one.host} (process {one.process}) has entered {behind[rank]} collectives, the "
            f"others {most}; it is in {_place(one)}"
        )
    entered = {rank: name for rank, (_, name) in known.items()}
    if len(set(entered.values())) > 1:
        (common, count), *_ = Counter(entered.values()).most_common()
        if 2 * count <= len(entered):
            each = "; ".join(
                f"rank {rank} on {found[rank].host} in {name}" for rank, name in sorted(entered.items())[:4]
            )
            return f"{head}ranks are in different collectives, none in that of a majority: {each}"
        odd = min(rank for rank, name in entered.items() if name != common)
        return (
            f"{head}ranks are in different collectives: rank {odd} on {found[odd].host} in {entered[odd]}, others in "
            f"{common}; it is in {_place(found[odd])}"
        )
    return f"{head}all ranks are in the same collective, {known[min(known)][1]}: the network, or a rank's thread of it"


def _place(one: Whereabouts) -> str:
    return " ".join(one.stack[-1].split()) if one.stack else one.phase


def _places(found: Mapping[int, Whereabouts]) -> str:
    return "; ".join(f"rank {rank} in {_place(one)}" for rank, one in sorted(found.items())[:4])
