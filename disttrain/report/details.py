"""What stands below the charts: events, profile, checkpoints, ownership, config, environment and samples, as HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from re import sub
from typing import Any

from disttrain.report import formatting as f
from disttrain.report.html_tables import by_run, details, paragraph, pre, table
from disttrain.report.run_record import Event, RunRecord
from disttrain.report.table import number

MOST_EVENTS = 200
MOST_CHECKPOINTS = 60
MOST_SAMPLES = 40
MOST_SAMPLE_CHARACTERS = 4000
OWN_TO_A_RUN = ("run.name", "run.dir")
"""Settings that differ between any two runs."""

Section = Callable[[RunRecord, str], str]


def per_run(runs: Sequence[RunRecord], section: Section) -> str:
    """A section for each run; its summary begins with the run's name when there are several."""
    return "\n".join(section(run, f"{run.label}: " if len(runs) > 1 else "") for run in runs)


def events_table(run: RunRecord, whose: str) -> str:
    """Checkpoints are the first to be left out of a long table: they have one of their own."""
    events = run.events
    if not events:
        return ""
    shown = events
    if len(shown) > MOST_EVENTS:
        shown = [event for event in shown if event.kind != "checkpoint"][-MOST_EVENTS:]
    left_out = len(events) - len(shown)
    rows = [(f.seconds_text(e.seconds), f"{e.step:,}", e.kind.replace("_", " "), e.text) for e in shown]
    note = paragraph(f"{left_out:,} events are left out, checkpoints first.") if left_out else ""
    counted = _counted(events)
    return details(
        _summary(whose, "every event"),
        table(("after", "step", "kind", "what"), rows, numeric=(0, 1)) + note,
        note=counted,
    )


def _counted(events: Sequence[Event]) -> str:
    kinds = [event.kind for event in events]
    return ", ".join(f"{kinds.count(kind):,} {kind.replace('_', ' ')}" for kind in dict.fromkeys(kinds))


def profile_table(run: RunRecord, whose: str) -> str:
    profile = run.profile
    rows = profile.get("operators")
    operators = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not operators:
        return ""
    cells = [
        (
            row.get("name", ""),
            f.whole(number(row.get("calls"))),
            f.seconds_text(number(row.get("self_seconds"))),
            f.percent(number(row.get("share"))),
        )
        for row in operators
    ]
    about = table(("operator", "calls", "self time", "share"), cells, numeric=(1, 2, 3))
    return details(
        _summary(whose, "profile"),
        paragraph(_profiled(profile)) + about,
        opened=not whose,
        note=f"{len(cells)} operators",
    )


def _profiled(profile: dict[str, Any]) -> str:
    steps = profile.get("steps")
    parts = [f"Steps {steps[0]} to {steps[1]}" if isinstance(steps, list) and len(steps) == 2 else "Some steps"]
    parts += [f"of {profile['world']} ranks"] if isinstance(profile.get("world"), int) else []
    times = []
    for key, words in (
        ("step_seconds", "a step {}"),
        ("communication_seconds", "communication {}"),
        ("exposed_communication_seconds", "of it not hidden behind computing {}"),
    ):
        if (seconds := number(profile.get(key))) is not None:
            times.append(words.format(f.seconds_text(seconds)))
    return " ".join(parts) + (": " + ", ".join(times) if times else "") + "."


def checkpoints_table(run: RunRecord, whose: str) -> str:
    rows = [
        (
            f.whole(number(row.get("checkpoint_step", row["step"]))),
            f.bytes_text(number(row.get("checkpoint_bytes"))),
            f.seconds_text(number(row.get("checkpoint_write_seconds"))),
            f.seconds_text(number(row.get("checkpoint_stall_seconds"))),
        )
        for row in run.checkpoints.rows
    ]
    if not rows:
        return ""
    inner = table(("step", "size", "writing", "training stood still"), rows[-MOST_CHECKPOINTS:], numeric=(0, 1, 2, 3))
    return details(_summary(whose, "every checkpoint"), inner, note=_newest(rows, MOST_CHECKPOINTS))


def ownership_table(run: RunRecord, whose: str) -> str:
    """Groups, then their parameters with the numbered layers as one."""
    listed = run.ownership.get("parameters")
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    if not rows:
        return ""
    groups, folded = [], []
    for name in dict.fromkeys(str(row.get("group", "")) for row in rows):
        members = [row for row in rows if str(row.get("group", "")) == name]
        first = members[0]
        total = f.short(_sum(members, "elements")), f.bytes_text(_sum(members, "state_bytes"))
        how = (first.get("algorithm", ""), first.get("clip", ""), first.get("settings", ""))
        groups.append((name, f"{len(members):,}", *total, *how))
        folded += [(name, *cells) for cells in _folded(members)]
    group_header = ("group", "parameters", "elements", "state", "algorithm", "clip", "settings")
    inner = table(group_header, groups, numeric=(1, 2, 3))
    inner += table(("group", "parameter", "count", "shape", "placement"), folded, numeric=(2,))
    exchanges = run.ownership.get("matrix_exchanges")
    for lines in exchanges if isinstance(exchanges, list) else []:
        inner += pre("\n".join(map(str, lines)) if isinstance(lines, list) else lines)
    return details(
        _summary(whose, "who owns which parameter"), inner, note=f"{len(rows):,} parameters in {len(groups):,} groups"
    )


def _folded(members: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    counts: dict[tuple[str, str, str], int] = {}
    for row in members:
        shape = row.get("shape")
        size = " x ".join(map(str, shape)) if isinstance(shape, list) else ""
        key = (sub(r"\.\d+\.", ".*.", str(row.get("parameter", ""))), size or "1", str(row.get("placement", "")))
        counts[key] = counts.get(key, 0) + 1
    return [(parameter, str(count), size, placement) for (parameter, size, placement), count in counts.items()]


def _sum(rows: Sequence[dict[str, Any]], key: str) -> float:
    return sum(number(row.get(key)) or 0.0 for row in rows)


def config_tables(runs: Sequence[RunRecord]) -> str:
    """All settings; for several runs those that differ come first."""
    flat = [flattened(run.config) for run in runs]
    if not any(flat):
        return ""
    labels = [run.label for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [(key, [_setting(settings, key) for settings in flat]) for key in keys]
    inner = ""
    if len(runs) > 1:
        differing = [(key, cells) for key, cells in rows if len(set(cells)) > 1 and key not in OWN_TO_A_RUN]
        title = f"<h3>Settings that differ</h3>\n{by_run(labels, differing)}\n"
        inner = title if differing else paragraph("No setting differs but the runs' names.")
    return inner + details("All settings", by_run(labels, rows), note=f"{len(keys):,}")


def flattened(value: Any, path: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; a list is a value."""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flattened(inner, f"{path}.{key}" if path else str(key))
    return found


def _setting(settings: dict[str, Any], key: str) -> str:
    if key not in settings:
        return ""
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value)


def environment_table(runs: Sequence[RunRecord]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.environment))
    if not keys:
        return ""
    rows = [(key.replace("_", " "), [run.environment.get(key, "") for run in runs]) for key in keys]
    return details("Environment", by_run([run.label for run in runs], rows))


def samples_section(run: RunRecord, whose: str) -> str:
    """The newest sample open, the earlier ones closed."""
    blocks = []
    for position, (step, sample) in enumerate(run.samples[: -MOST_SAMPLES - 1 : -1]):
        cut = sample.strip("\n")[:MOST_SAMPLE_CHARACTERS]
        note = f"the first {MOST_SAMPLE_CHARACTERS:,} characters" if len(sample) > MOST_SAMPLE_CHARACTERS else ""
        blocks.append(details(_summary(whose, f"after {step:,} steps"), pre(cut), opened=position == 0, note=note))
    left_out = len(run.samples) - len(blocks)
    return "\n".join(blocks) + (paragraph(f"{left_out:,} earlier ones are left out.") if left_out else "")


def _summary(whose: str, what: str) -> str:
    return f"{whose}{what}" if whose else what[0].upper() + what[1:]


def _newest(rows: Sequence[object], most: int) -> str:
    return f"the newest {most} of {len(rows):,}" if len(rows) > most else f"{len(rows):,}"
