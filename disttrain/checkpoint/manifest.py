"""The manifest: what a checkpoint holds, where each region lies, and the checksums. Its presence is the commit.

This file imports no torch, so that listing and verifying checkpoints starts at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_STEP_NAME = re.compile(r"step-(\d{8})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """One data file: its plain name, size in bytes and the crc32 of all its bytes (eight hexadecimal digits)."""

    name: str
    bytes: int
    crc32: str


@dataclass(frozen=True)
class Chunk:
    """One box of a tensor, in elements of the whole tensor, stored in `file` under `key`."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor: dtype (torch's name, as in "float32"), global shape, and the boxes that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything a checkpoint says about itself; `samples` and `tokens` are those consumed so far."""

    run_id: str
    step: int
    samples: int
    tokens: int
    world_size: int
    strategy: str
    config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    files: tuple[FileEntry, ...]
    tensors: dict[str, TensorEntry]
    format_version: int = FORMAT_VERSION


def step_directory(checkpoints_directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies once it is committed."""
    return checkpoints_directory / f"step-{step:08d}"


def committed_steps(checkpoints_directory: Path) -> list[Path]:
    """The committed checkpoints, newest first; a directory without a manifest or with another name never counts."""
    if not checkpoints_directory.is_dir():
        return []
    named = (path for path in checkpoints_directory.iterdir() if _STEP_NAME.fullmatch(path.name))
    return sorted((path for path in named if (path / MANIFEST_NAME).is_file()), reverse=True)


def fsync_directory(directory: Path) -> None:
    """Make the names inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, with its own sha256, into `directory` and fsync both.

    Raises TypeError when `config` or `data` cannot be written as JSON.
    """
    canonical = _canonical(_as_json(manifest))
    with (directory / MANIFEST_NAME).open("x", encoding="utf-8") as file:
        file.write(f'{canonical[:-1]},"sha256":"{_sha256(canonical)}"}}\n')
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(directory)


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint; the data files are not opened.

    Raises UserError when it is missing, not JSON, of another format, not what was written (sha256), names a file
    outside the directory, or when the boxes of a tensor do not tile it exactly.
    """
    path = directory / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}; use another checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); use another checkpoint") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else None
        raise UserError(f"{path}: format_version is {found!r}, this disttrain reads {FORMAT_VERSION}; use its version")
    if content.pop("sha256", None) != _sha256(_canonical(content)):
        raise UserError(
            f"{path}: sha256 does not match: the manifest was changed after writing; use another checkpoint"
        )
    try:
        manifest = _parse(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: malformed ({type(error).__name__}: {error}); use another checkpoint") from None
    named = _STEP_NAME.fullmatch(directory.name)
    if named and int(named[1]) != manifest.step:
        raise UserError(f"{path}: holds step {manifest.step}, not that of its directory; rename the directory back")
    return manifest


def verify_file(directory: Path, entry: FileEntry) -> str | None:
    """Compare one data file with its entry: None when every byte is right, otherwise the problem in words."""
    path = directory / entry.name
    try:
        size, crc = 0, 0
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                size, crc = size + len(block), zlib.crc32(block, crc)
    except OSError as error:
        return f"{path}: cannot read: {error.strerror}"
    if size != entry.bytes:
        return f"{path}: {size} bytes, the manifest says {entry.bytes} ({size - entry.bytes:+d})"
    if f"{crc:08x}" != entry.crc32:
        return f"{path}: crc32 is {crc:08x}, the manifest says {entry.crc32}: the content was damaged"
    return None


def verify_files(directory: Path, manifest: Manifest) -> list[str]:
    """Read every data file of a checkpoint and return what is wrong, in words; an empty list when all is right."""
    return [problem for entry in manifest.files if (problem := verify_file(directory, entry))]


def _as_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a reader will see it: `dataclasses.asdict` would take seconds for thousands of ranks."""
    content = dict(vars(manifest))
    content["files"] = [vars(entry) for entry in manifest.files]
    chunks = {name: [vars(chunk) for chunk in entry.chunks] for name, entry in manifest.tensors.items()}
    content["tensors"] = {name: vars(entry) | {"chunks": chunks[name]} for name, entry in manifest.tensors.items()}
    # The user's values go through JSON once, since keys that become strings would sort differently.
    return content | {key: json.loads(json.dumps(content[key])) for key in ("config", "data", "versions")}


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _sha256(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()


def _parse(content: dict[str, Any]) -> Manifest:
    files = tuple(FileEntry(_file_name(f["name"]), _natural(f["bytes"]), str(f["crc32"])) for f in content["files"])
    names = {entry.name for entry in files}
    tensors = {name: _parse_tensor(name, entry, names) for name, entry in content["tensors"].items()}
    values: dict[str, Any] = {key: _natural(content[key]) for key in ("step", "samples", "tokens", "world_size")}
    values |= {key: str(content[key]) for key in ("run_id", "strategy")}
    values |= {key: dict(content[key]) for key in ("config", "data", "versions")}
    return Manifest(files=files, tensors=tensors, **values)


def _parse_tensor(name: str, entry: dict[str, Any], files: set[str]) -> TensorEntry:
    boxes = ((str(c["file"]), str(c["key"]), _naturals(c["offsets"]), _naturals(c["sizes"])) for c in entry["chunks"])
    chunks = tuple(Chunk(*box) for box in boxes)
    shape = _naturals(entry["shape"])
    for chunk in chunks:
        if chunk.file not in files:
            raise ValueError(f"{name}: {chunk.file!r} is not one of the checkpoint's files")
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(shape) or any(end > length for end, length in zip(ends, shape, strict=True)):
            raise ValueError(f"{name}: region {chunk.offsets}+{chunk.sizes} lies outside shape {shape}")
    if _overlapping(chunks):
        raise ValueError(f"{name}: regions overlap")
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(shape):
        raise ValueError(f"{name}: regions hold {covered} elements, shape {shape} has {math.prod(shape)}")
    return TensorEntry(str(entry["dtype"]), shape, chunks)


def _overlapping(chunks: tuple[Chunk, ...]) -> bool:
    """Whether any two boxes meet: a sweep along the axis with most cuts, so shards cost no pairwise comparison."""
    if len(chunks) < 2 or not chunks[0].sizes:
        return len(chunks) > 1
    axis = max(range(len(chunks[0].sizes)), key=lambda i: len({chunk.offsets[i] for chunk in chunks}))
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
        active = [other for other in active if other.offsets[axis] + other.sizes[axis] > chunk.offsets[axis]]
        if any(_meet(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _meet(a: Chunk, b: Chunk) -> bool:
    edges = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(a0 < b0 + b_size and b0 < a0 + a_size for a0, a_size, b0, b_size in edges)


def _file_name(name: Any) -> str:
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"file name {name!r} is not a plain *.safetensors name")
    return name


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _naturals(values: Any) -> tuple[int, ...]:
    return tuple(_natural(value) for value in values)
