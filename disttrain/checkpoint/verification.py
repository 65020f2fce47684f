"""The data files of a checkpoint against its manifest: sizes, checksums, and headers that promise the same.

This file imports no torch, and nothing here runs or unpacks what a file holds.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, BinaryIO

from disttrain.checkpoint.manifest import FileEntry, Manifest
from disttrain.checkpoint.placement import STORED_DTYPES
from disttrain.checkpoint.untrusted import naturals, plain_size, strict_json, table

_HEADER_LIMIT_BYTES = 100_000_000
"""What safetensors itself reads at most."""
_LENGTH_BYTES = 8
_READ_BYTES = 4 * 2**20


def missing_bytes(directory: Path, manifest: Manifest) -> list[str]:
    """A look at the data files without reading them: each a plain file of its declared size, or the problem."""
    return [problem for entry in manifest.files if (problem := _size_problem(directory / entry.name, entry))]


def verify_file(directory: Path, manifest: Manifest, entry: FileEntry) -> str | None:
    """Read one data file once: None when every byte is right and it holds what the manifest places in it.

    Otherwise the problem in words. A file of another size is not read, and anything but a plain file not opened.
    """
    path = directory / entry.name
    if problem := _size_problem(path, entry):
        return problem
    try:
        with path.open("rb") as file:
            length, header, crc = _read(file, entry.bytes)
    except OSError as error:
        return f"{path}: cannot read: {error.strerror}"
    if f"{crc:08x}" != entry.crc32:
        return f"{path}: crc32 is {crc:08x}, the manifest says {entry.crc32}: the content was damaged"
    if header is None:
        return f"{path}: not safetensors: its header would have {length:,} of the {entry.bytes:,} bytes"
    try:
        _check_header(header, manifest, entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{path}: not the safetensors file of the manifest: {error}"
    return None


def verify_files(directory: Path, manifest: Manifest) -> list[str]:
    """Read every data file of a checkpoint and return what is wrong, in words; an empty list when all is right."""
    return [problem for entry in manifest.files if (problem := verify_file(directory, manifest, entry))]


def _size_problem(path: Path, entry: FileEntry) -> str | None:
    try:
        size = plain_size(path)
    except OSError as error:
        return f"{path}: cannot read: {error.strerror}"
    if size != entry.bytes:
        return f"{path}: {size:,} bytes, the manifest says {entry.bytes:,} ({size - entry.bytes:+,d})"
    return None


def _read(file: BinaryIO, size: int) -> tuple[int, bytes | None, int]:
    """The header's length, the header unless that length is absurd, and the crc32 of the whole file."""
    prefix = file.read(_LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    plausible = length <= min(size - _LENGTH_BYTES, _HEADER_LIMIT_BYTES)
    header = file.read(length) if plausible else None
    crc = zlib.crc32(header or b"", zlib.crc32(prefix))
    while block := file.read(_READ_BYTES):
        crc = zlib.crc32(block, crc)
    return length, header, crc


def _check_header(header: bytes, manifest: Manifest, entry: FileEntry) -> None:
    """Raise ValueError unless a file's header tells of the same run, step and tensors as the manifest does."""
    content = table(strict_json(header))
    about = table(content.pop("__metadata__", None))
    for name, wanted in (("run_id", manifest.run_id), ("step", str(manifest.step))):
        if about.get(name) != wanted:
            raise ValueError(f"its {name} is {shortened(about.get(name))}, the manifest says {wanted!r}")
    promised = manifest.contents[entry.name]
    if content.keys() != promised.keys():
        key = min(content.keys() ^ promised.keys())
        lacking = "has no key" if key in promised else "has a key that the manifest lacks:"
        raise ValueError(f"it {lacking} {shortened(key)}")
    spans = sorted(_span(key, content[key], *wanted) for key, wanted in promised.items())
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != entry.bytes - _LENGTH_BYTES - len(header):
        raise ValueError("data_offsets overlap, leave gaps or end elsewhere than the file")


def _span(key: str, stored: dict[str, Any], dtype: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where a tensor lies in the data, once dtype, shape and length are what the manifest says."""
    name, item_bytes = STORED_DTYPES[dtype]
    found = stored.get("dtype"), naturals(stored.get("shape"))
    if found != (name, sizes):
        there = f"{shortened(found[0])} {shortened(found[1])}"
        raise ValueError(f"{key}: {there}, the manifest says {name!r} {sizes}")
    span, wanted_bytes = naturals(stored.get("data_offsets")), math.prod(sizes) * item_bytes
    if len(span) != 2 or span[1] - span[0] != wanted_bytes:
        raise ValueError(f"{key}: data_offsets {shortened(span)} are not {wanted_bytes:,} bytes long")
    return span
