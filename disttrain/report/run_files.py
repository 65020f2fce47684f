"""Reading run folders; a run may be writing to one of them at this moment."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from disttrain.errors import UserError
from disttrain.report.run_record import RunRecord
from disttrain.report.table import Row, is_step
from disttrain.train.folder import RunFolder


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Every run, with labels that differ. UserError with every problem of every folder."""
    problems: list[str] = []
    runs: list[RunRecord] = []
    places = [os.path.realpath(folder) for folder in folders]
    for index, folder in enumerate(folders):
        if places[index] in places[:index]:
            problems.append(f"{folder}: given twice; name each run once")
            continue
        try:
            runs.append(read_run(folder))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    labels = distinct_labels([(run.label, run.folder) for run in runs])
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def read_run(path: Path) -> RunRecord:
    """UserError when this is no run folder, or one in which nothing was logged yet."""
    folder = RunFolder(path)
    try:
        os.scandir(path).close()
    except OSError as error:
        reason = "no such folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{path}: {reason}; name a run folder, such as runs/NAME") from None
    notes: list[str] = []
    config = _read_table(folder.config, notes)
    if not config and not folder.metrics.exists():
        raise UserError(f"{path}: no run folder (no config.json, no metrics.jsonl); name one such as runs/NAME")
    rows = [row for row in read_lines(folder.metrics, notes) if is_step(row.get("step"))]
    if not any("loss" in row or "validation_loss" in row for row in rows):
        raise UserError(f"{path}: no metrics yet; try again after the first log row (monitor.log_every)")
    name = config.get("run", {}).get("name") if isinstance(config.get("run"), dict) else None
    return RunRecord(
        folder=path,
        label=str(name or Path(os.path.realpath(path)).name),
        config=config,
        rows=rows,
        status=_read_table(path / "status.json", notes),
        ownership=_read_table(path / "ownership.json", notes),
        environment=_read_table(path / "environment.json", notes),
        profile=_read_table(path / "trace" / "summary.json", notes),
        raw_events=read_lines(path / "events.jsonl", notes),
        samples=split_samples(_read_text(path / "samples.txt", notes)),
        notes=tuple(notes),
    )


def read_lines(path: Path, notes: list[str]) -> list[Row]:
    """The objects of a JSON-lines file. A torn last line belongs to a run that is writing; other bad ones are noted."""
    rows: list[Row] = []
    bad = 0
    lines = _read_text(path, notes).split("\n")
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            bad += index < len(lines) - 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad:,} {'line is' if bad == 1 else 'lines are'} damaged and left out")
    return rows


def split_samples(text: str) -> list[tuple[int, str]]:
    """Step and text of each block `--- step N`."""
    found: list[tuple[int, list[str]]] = []
    for line in text.split("\n"):
        step = line.removeprefix("--- step ")
        if line.startswith("--- step ") and step.isdecimal():
            found.append((int(step), []))
        elif found:
            found[-1][1].append(line)
    return [(step, "\n".join(lines).rstrip("\n")) for step, lines in found]


def distinct_labels(named: Sequence[tuple[str, Path]]) -> list[str]:
    """The names of the runs; where some are equal, with as much of the folder's path as tells them apart."""
    labels = [name for name, _ in named]
    for index, (name, folder) in enumerate(named):
        rivals = [other for position, (same, other) in enumerate(named) if same == name and position != index]
        if not rivals:
            continue
        own, *others = (Path(os.path.realpath(place)).parts for place in (folder, *rivals))
        depth = next(n for n in range(1, len(own) + 1) if all(own[-n:] != parts[-n:] for parts in others))
        labels[index] = f"{name} ({'/'.join(own[-depth:])})"
    return labels


def _read_text(path: Path, notes: list[str]) -> str:
    """Empty when there is no such file."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        notes.append(f"{path.name}: not read: {error.strerror}")
        return ""


def _read_table(path: Path, notes: list[str]) -> dict[str, Any]:
    """Empty when there is no such file, or when it holds no JSON object."""
    text = _read_text(path, notes)
    try:
        table = json.loads(text) if text else {}
    except ValueError:
        table = None
    if not isinstance(table, dict):
        notes.append(f"{path.name}: damaged and left out")
        return {}
    return table
