"""One safetensors file: written in a stream with its checksum, read box by box."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.manifest import FileEntry
from disttrain.errors import UserError

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_NAMES}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> FileEntry:
    """Write and fsync one safetensors file, one tensor in host memory at a time; returns its size and crc32.

    Raises UserError when the disk refuses, with the space that was needed and the space that is left.
    """
    # Widest elements first keeps every tensor aligned, as safetensors' own writer does.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))
    content: dict[str, Any] = {"__metadata__": dict(header)}
    end = 0
    for key, tensor in ordered:
        start, end = end, end + tensor.nbytes
        dtype = SAFETENSORS_NAMES[tensor.dtype]
        content[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    try:
        crc = _write_blocks(path, prefix, [tensor for _, tensor in ordered])
    except OSError as error:
        raise UserError(_disk_problem(path, error, len(prefix) + end)) from error
    return FileEntry(path.name, len(prefix) + end, f"{crc:08x}")


def _write_blocks(path: Path, prefix: bytes, tensors: list[Tensor]) -> int:
    crc = zlib.crc32(prefix)
    with path.open("xb") as file:
        file.write(prefix)
        for tensor in tensors:
            block = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            crc = zlib.crc32(block, crc)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return crc


def _disk_problem(path: Path, error: OSError, needed_bytes: int) -> str:
    if error.errno == errno.ENOENT:
        return f"{path}: cannot write: no such directory on this rank; put the run folder where every rank sees it"
    written_bytes = path.stat().st_size if path.exists() else 0
    free_bytes = shutil.disk_usage(path.parent).free
    arithmetic = f"{written_bytes} of {needed_bytes} bytes written, {free_bytes} bytes free"
    return f"{path}: cannot write: {error.strerror or error}; {arithmetic}; free space or move the run folder"


def read_region(file: Any, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Copy one box of a stored tensor out of an open `safe_open` file; `offsets` count from that tensor's corner.

    Raises ValueError when the file holds another shape or dtype.
    """
    region = file.get_slice(key)[tuple(slice(start, start + n) for start, n in zip(offsets, sizes, strict=True))]
    # The caller's copy_ would broadcast or convert in silence.
    if tuple(region.shape) != sizes or region.dtype != dtype:
        raise ValueError(f"{key} holds {tuple(region.shape)} {region.dtype}, expected {sizes} {dtype}")
    return region
