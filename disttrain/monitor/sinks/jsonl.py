"""metrics.jsonl: one JSON object per log step, the truth that other views are made from."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path


class JsonlSink:
    """Appends to `path`; what a run recorded beyond `resumed_step` is dropped first, by one atomic replacement."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        _truncate(path, resumed_step)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""

    def log(self, record: dict[str, float]) -> None:
        # NaN is no JSON: a number that is not finite is written as its name.
        plain = {key: value if math.isfinite(value) else str(value) for key, value in record.items()}
        self._waiting += json.dumps(plain).encode() + b"\n"
        # A full disk must not end a run: what it does not take now, it may take with the next record.
        with suppress(OSError):
            self._write()

    def close(self) -> None:
        """Write what a full disk refused so far. OSError when it still does."""
        try:
            self._write()
        finally:
            os.close(self._descriptor)

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]


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
