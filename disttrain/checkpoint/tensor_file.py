"""One safetensors file: written in a stream with its checksum, read box by box."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.byte_stream import ByteStream
from disttrain.checkpoint.manifest import FileEntry
from disttrain.checkpoint.placement import STORED_DTYPES
from disttrain.errors import StorageError

SAFETENSORS_NAMES: dict[torch.dtype, str] = {
    getattr(torch, name): stored for name, (stored, _) in STORED_DTYPES.items()
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_NAMES}


@dataclass(frozen=True)
class Box:
    """One tensor to be written under `key`; `read` is called when its turn comes, and what it gave is let go of."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> Box:
        """A tensor that is there already."""
        return cls(key, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, boxes: Sequence[Box], header: Mapping[str, str]) -> FileEntry:
    """Write and fsync one safetensors file, one tensor in host memory at a time; returns its size and crc32.

    Raises StorageError when the disk refuses, with the space that was needed and the space that is left.
    """
    # Widest elements first keeps every tensor aligned, as safetensors' own writer does.
    ordered = sorted(boxes, key=lambda box: (-box.dtype.itemsize, box.key))
    content: dict[str, Any] = {"__metadata__": dict(header)}
    end = 0
    for box in ordered:
        start, end = end, end + box.nbytes
        dtype = SAFETENSORS_NAMES[box.dtype]
        content[box.key] = {"dtype": dtype, "shape": list(box.shape), "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    try:
        crc = _write_blocks(path, prefix, ordered)
    except OSError as error:
        raise StorageError(disk_problem(path, error, len(prefix) + end)) from error
    return FileEntry(path.name, len(prefix) + end, f"{crc:08x}")


def _write_blocks(path: Path, prefix: bytes, boxes: Sequence[Box]) -> int:
    with ByteStream(path) as stream:
        stream.write(prefix)
        for box in boxes:
            tensor = box.read().detach().cpu().contiguous()
            if tensor.dtype != box.dtype or tensor.shape != box.shape:
                raise ValueError(f"{box.key}: promised {box.dtype} {box.shape}, got {tensor.dtype} {tensor.shape}")
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # else it would live until the next one is there
    return stream.crc32


def disk_problem(path: Path, error: OSError, needed_bytes: int | None = None) -> str:
    """One line about a write that failed: where, why, the bytes needed and free, and what to do."""
    if error.errno == errno.ENOENT:
        remedy = "it was removed, or this rank does not see it: use a folder that all see"
        return f"{path}: cannot write: no such directory here; {remedy}"
    arithmetic = []
    with suppress(OSError):
        if needed_bytes is not None:
            arithmetic = [f"{path.stat().st_size if path.is_file() else 0:,} of {needed_bytes:,} bytes written"]
        arithmetic += [f"{shutil.disk_usage(path.parent).free:,} bytes free"]
    remedy = "free space, check permissions, or use another folder"
    return "; ".join([f"{path}: cannot write: {error.strerror or error}", *arithmetic, remedy])


def read_region(file: Any, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Copy one box of a stored tensor out of an open `safe_open` file; `offsets` count from that tensor's corner.

    Raises ValueError when the file holds another shape or dtype.
    """
    region = file.get_slice(key)[tuple(slice(start, start + n) for start, n in zip(offsets, sizes, strict=True))]
    # The caller's copy_ would broadcast or convert in silence.
    if tuple(region.shape) != sizes or region.dtype != dtype:
        raise ValueError(f"{key} holds {tuple(region.shape)} {region.dtype}, expected {sizes} {dtype}")
    return region
