"""One thing that the doctor has to say, and how grave a set of them is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from disttrain.errors import EXIT_DONE, EXIT_FAILED

Severity = Literal["ok", "note", "warning", "breaks"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "breaks")
"""From best to worst; `breaks` is what will end or spoil the run."""

Figure = float | int | str | None


@dataclass(frozen=True)
class Finding:
    severity: Severity
    check: str
    """The name of the check, as docs/doctor.md has it."""
    what: str
    """What was found, with its figures in words."""
    where: tuple[str, ...] = ()
    """The hosts that it is about; those of a finding that `breaks` are left out of the next run."""
    remedy: str = ""
    """What to do; empty where nothing is to be done."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """The same numbers for programs, with units in their names."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"where": list(self.where), "figures": dict(self.figures)}


def worst(findings: Iterable[Finding]) -> Severity:
    """`ok` where there are none."""
    return max((finding.severity for finding in findings), key=SEVERITIES.index, default="ok")


def exit_code(findings: Iterable[Finding]) -> int:
    return EXIT_FAILED if worst(findings) == "breaks" else EXIT_DONE


def failing_hosts(findings: Iterable[Finding]) -> list[str]:
    """Each host once, in alphabetical order."""
    return sorted({host for finding in findings if finding.severity == "breaks" for host in finding.where})
