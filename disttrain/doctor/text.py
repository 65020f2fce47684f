"""The findings as people read them, and as programs do."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from disttrain.doctor.facts import Record
from disttrain.doctor.finding import SEVERITIES, Finding, failing_hosts, worst
from disttrain.doctor.words import some

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "breaks": "bold red"}
WIDEST = 110


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """The worst last, where a terminal ends; what is well is one line for each check, however many nodes there are."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), width=min(console.width, WIDEST))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for severity in SEVERITIES:
        of_kind = [finding for finding in findings if finding.severity == severity]
        for finding in _merged(of_kind) if severity == "ok" else of_kind:
            text = Text(f"{some(finding.where, 3)}: {finding.what}" if finding.where else finding.what)
            if finding.remedy:
                text.append(f"\n> {finding.remedy}", style="dim")
            table.add_row(Text(severity, style=STYLES[severity]), finding.check, text)
    console.print(table)
    console.print(Text(verdict(findings), style=STYLES[worst(findings)]))


def verdict(findings: Sequence[Finding]) -> str:
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
    warnings = f"{counts['warning']} warning{'' if counts['warning'] == 1 else 's'}"
    if counts["breaks"]:
        hosts = failing_hosts(findings)
        return f"{counts['breaks']} will break the run, {warnings}" + (f"; leave out {some(hosts, 8)}" if hosts else "")
    return f"nothing here will break the run, {warnings}"


def as_json(record: Record, findings: Sequence[Finding], failing: Sequence[str]) -> str:
    return json.dumps(
        {
            "verdict": worst(findings),
            "failing_nodes": list(failing),
            "findings": [finding.as_json() for finding in findings],
            "facts": record.model_dump(mode="json"),
        },
        indent=1,
    )


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """Of the same check on several nodes the first one speaks for all."""
    by_check: dict[str, list[Finding]] = {}
    for finding in findings:
        by_check.setdefault(finding.check, []).append(finding)
    merged = []
    for same in by_check.values():
        nodes = len({host for finding in same for host in finding.where})
        if len(same) > 1 and nodes > 1:
            first = same[0]
            what = f"{nodes} nodes are well; {first.where[0]}: {first.what}"
            merged.append(Finding("ok", first.check, what))
        else:
            merged.extend(same)
    return [Finding("ok", each.check, each.what) if len(each.where) != 1 else each for each in merged]
