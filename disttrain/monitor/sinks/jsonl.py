"""metrics.jsonl: one JSON object per log step, the truth that other views are made from."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


class JsonlSink:
    """Appends to `path`; what a run recorded beyond `resumed_step` is dropped first, by one atomic replacement."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        _truncate(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: dict[str, float]) -> None:
        # NaN is no JSON: a number that is not finite is written as its name.
        plain = {key: value if math.isfinite(value) else str(value) for key, value in record.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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
