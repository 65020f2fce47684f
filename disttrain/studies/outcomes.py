"""What a run folder says of its run, for the table: losses, bytes of state, and where the time of a step went."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from disttrain.checkpoint.manifest import committed_steps, read_manifest
from disttrain.checkpoint.placement import STORED_DTYPES
from disttrain.errors import UserError
from disttrain.train.folder import RunFolder

MODEL_PARTS = ("forward_seconds", "backward_seconds")
ALL_PARTS = (*MODEL_PARTS, "optimizer_seconds", "communication_seconds", "data_seconds")


@dataclass(frozen=True)
class Outcome:
    """Of one finished run. `curve`: tokens, steps and validation loss of every evaluation."""

    loss: float
    """Validation loss at the end, in nats a token; infinite where it is none."""
    curve: tuple[tuple[int, int, float], ...]
    step_over_model: float | None
    """Time of a step over that of its forward and backward, which cost the same whatever the optimizer: both are taken
    within the same steps, so that a busy machine slows both."""
    state_bytes: int | None
    wall_seconds: float


def state_of(folder: Path) -> str:
    """`completed`, `failed`, ... of status.json; "" before the first run."""
    return str(RunFolder(folder).read_status().get("state", ""))


def read_outcome(folder: Path) -> Outcome | None:
    """None unless the run is complete."""
    status = RunFolder(folder).read_status()
    if status.get("state") != "completed":
        return None
    rows = _rows(folder / "metrics.jsonl")
    curve = tuple((row["tokens"], row["step"], loss(row)) for row in rows if "validation_loss" in row)
    if not curve:
        return None
    wall = status.get("wall_seconds", 0.0)
    return Outcome(curve[-1][2], curve, _step_over_model(rows), _state_bytes(folder), float(wall))


def loss(row: dict[str, Any]) -> float:
    """JSON has words for what is not finite."""
    value = float(row["validation_loss"])
    return value if math.isfinite(value) else math.inf


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _step_over_model(rows: list[dict[str, Any]]) -> float | None:
    """Over all log rows but the first, in which things are made that stay; None for a run that has no other."""
    logged = [row for row in rows if all(part in row for part in MODEL_PARTS)]
    whole = model = 0.0
    for before, row in pairwise(logged):
        steps = row["step"] - before["step"]
        whole += steps * sum(row.get(part, 0.0) for part in ALL_PARTS)
        model += steps * sum(row[part] for part in MODEL_PARTS)
    return whole / model if model else None


def _state_bytes(folder: Path) -> int | None:
    """Of the optimizer, all ranks together, as its last checkpoint holds it; step counters are in it."""
    steps = committed_steps(folder / "checkpoints")
    with suppress(UserError):
        tensors = read_manifest(steps[0]).tensors if steps else {}
        sizes = [
            STORED_DTYPES[entry.dtype][1] * math.prod(entry.shape)
            for name, entry in tensors.items()
            if name.startswith("optim.")
        ]
        return sum(sizes) if tensors else None
    return None
