"""metrics.jsonl: one JSON object per log step, the truth that other views are made from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from disttrain.monitor.record import Histogram, Record, Value, plain


class JsonlSink:
    """Appends to `path`; what a run recorded beyond `resumed_step` is dropped first, by one atomic replacement."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        _truncate(path, resumed_step)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""
        self._closed = False

    def log(self, record: Record) -> None:
        self._waiting += json.dumps(plain(record)).encode() + b"\n"
        # A full disk must not end a run: what it does not take now, it may take with the next record.
        with suppress(OSError):
            self._write()

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: the run goes on from there."""
        with suppress(OSError):
            self._write()
        self._waiting = b""
        os.close(self._descriptor)
        _truncate(self.path, step)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def close(self) -> None:
        """Write what a full disk refused so far. OSError when it still does."""
        if self._closed:
            return
        self._closed = True
        try:
            self._write()
        finally:
            os.close(self._descriptor)

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]


def read_rows(path: Path, after: int, last: int) -> Iterator[Record]:
    """The rows of steps beyond `after` and up to `last`, as they were logged; a file that still grows beyond `last` is
    read no further."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
                step = int(row["step"])
            except (ValueError, KeyError, TypeError):
                return
            if step > last:
                return
            if step > after:
                yield {key: _value(value) for key, value in row.items()}


def _value(value: object) -> Value:
    if isinstance(value, dict):
        return Histogram(tuple(value["edges"]), tuple(value["counts"]))
    return float(str(value)) if not isinstance(value, int | float) else value


def _truncate(path: Path, last_step: int) -> None:
    """Keep the records up to `last_step`; a last line that a kill cut short is dropped too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    shorter = path.with_name(path.name + ".tmp")
    with shorter.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    shorter.replace(path)
