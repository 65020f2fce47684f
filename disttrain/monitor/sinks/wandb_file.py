"""What W&B's client has really written to disk: it collects for seconds, and a kill loses what it holds.

Its file is a LevelDB log of protobuf records (wandb.proto, which the package ships and does not document; read with
0.31). Seven bytes of header, then blocks of 32 KiB with records of checksum (4), length (2), kind (1).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_HEADER_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_TAIL_BYTES = 1 << 20


def last_recorded_step(directory: Path, run_id: str) -> int:
    """The highest step in any of the run's files under `directory`/wandb, online or offline; 0 where there is none."""
    files = (directory / "wandb").glob(f"*run-*-{run_id}*/run-{run_id}.wandb")
    return max((_last_step(file) for file in files if file.parent.name != "latest-run"), default=0)


def history(file: Path) -> Iterator[dict[str, Any]]:
    """Every row that was logged, as key to JSON text; nested keys are joined with a dot."""
    for record in _records(file.read_bytes(), at_start=True):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}


def _last_step(file: Path) -> int:
    """Looked for from the end: the file of a long run has gigabytes."""
    size, tail = file.stat().st_size, _TAIL_BYTES
    while True:
        start = max(0, size - tail) // _BLOCK_BYTES * _BLOCK_BYTES
        with file.open("rb") as stream:
            stream.seek(start)
            content = stream.read()
        records = _records(content, at_start=start == 0)
        steps = [r.history.step.num for r in records if r.WhichOneof("record_type") == "history"]
        if steps or start == 0:
            return max(steps, default=0)
        tail *= 8


def _records(content: bytes, at_start: bool) -> Iterator[Any]:
    """From the beginning of a block; what a kill has cut short, at the end or before, is left out."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    parse: Any = wandb_internal_pb2

    position, parts = _HEADER_BYTES if at_start else 0, None
    while position + _HEADER_BYTES <= len(content):
        if (rest := _BLOCK_BYTES - position % _BLOCK_BYTES) < _HEADER_BYTES:
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += _HEADER_BYTES
        body = content[position : position + length]
        position += length
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            # A page of zeros, say: what follows is found again at the next block.
            position, parts = (position + _BLOCK_BYTES - 1) // _BLOCK_BYTES * _BLOCK_BYTES, None
            continue
        if len(body) < length:
            return
        if kind in (_FULL, _FIRST):
            parts = body
        elif parts is not None:
            parts += body
        if kind in (_FULL, _LAST) and parts is not None:
            with suppress(DecodeError):
                yield parse.Record.FromString(parts)
            parts = None
