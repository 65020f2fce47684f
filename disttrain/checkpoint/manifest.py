"""The manifest: what a checkpoint holds, where each region lies, and the checksums. Its presence is the commit.

This file imports no torch, so that listing and verifying checkpoints starts at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from disttrain.checkpoint.placement import STORED_DTYPES, Room, inside, tiles
from disttrain.checkpoint.untrusted import matching, natural, naturals, plain_size, strict_json, table, text
from disttrain.errors import UserError

FORMAT_VERSION = 2
MANIFEST_LIMIT_BYTES = 2**30
MANIFEST_NAME = "manifest.json"
_STEP_NAME = re.compile(r"step-(\d{8})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_CRC32 = re.compile(r"[0-9a-f]{8}")
_TABLES = ("config", "data", "versions", "extra")
_MOST_DIMS = 32


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
    """Everything a checkpoint says about itself; `samples` and `tokens` are those consumed so far.

    `extra` holds JSON values by owner, as in {"wandb": {"id": ...}}.
    """

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
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @cached_property
    def contents(self) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
        """For every file, what lies in it: key to dtype and shape."""
        contents: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {entry.name: {} for entry in self.files}
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                contents[chunk.file][chunk.key] = (tensor.dtype, chunk.sizes)
        return contents


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
    """Write `manifest.json`, with its own sha256, into `directory` and fsync both; raises what `to_bytes` raises."""
    write_bytes(directory, to_bytes(manifest))


def to_bytes(manifest: Manifest) -> bytes:
    """The content of `manifest.json`. TypeError or ValueError when a value or a name could not be read back."""
    for name in (manifest.run_id, manifest.strategy, *manifest.tensors):
        text(name)
    return sealed(_canonical(_as_json(manifest))).encode()


def write_bytes(directory: Path, content: bytes) -> None:
    """Write what `to_bytes` gave and fsync it and `directory`. OSError when the disk refuses."""
    with (directory / MANIFEST_NAME).open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(directory)


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint, an older format too; the data files are not opened.

    Raises UserError when it is missing, not a plain file, not JSON, of another format, not what was written (sha256),
    names a file outside the directory, promises more than its files can hold, or when boxes do not tile their tensor.
    """
    path = directory / MANIFEST_NAME
    try:
        manifest = _parse(_read(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}; use another checkpoint") from None
    except _RefusedError as error:
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed ({type(error).__name__}: {error}); use another checkpoint") from None
    named = _STEP_NAME.fullmatch(directory.name)
    if named and int(named[1]) != manifest.step:
        raise UserError(f"{path}: holds step {manifest.step}, not that of its directory; rename the directory back")
    return manifest


class _RefusedError(ValueError):
    """Words that need no more than the place."""


def _read(path: Path) -> dict[str, Any]:
    """The content of a manifest, checked as it was written and then brought to the present format."""
    if (size := plain_size(path)) > MANIFEST_LIMIT_BYTES:
        raise _RefusedError(f"{size:,} bytes, a manifest has at most {MANIFEST_LIMIT_BYTES:,}; use another checkpoint")
    raw = path.read_bytes()
    try:
        content = strict_json(raw)
    except ValueError as error:
        raise _RefusedError(f"not valid JSON ({error}); use another checkpoint") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    found = f"format_version is {shortened(version)}, this disttrain reads 1 to {FORMAT_VERSION}"
    if type(version) is not int or version < 1:
        raise _RefusedError(f"{found}; use another checkpoint")
    if version > FORMAT_VERSION:
        raise _RefusedError(f"{found}: written by a newer disttrain; upgrade disttrain")
    # The bytes as they are: what parses to the same values may still have been changed.
    if raw != sealed(raw[: raw.rfind(b',"sha256"')].decode() + "}").encode():
        raise _RefusedError("sha256 does not match: the manifest was changed after writing; use another checkpoint")
    del content["sha256"]
    for older in range(version, FORMAT_VERSION):
        content = _MIGRATIONS[older](content)
    return content


def _add_extra(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"extra": {}}


_MIGRATIONS = {1: _add_extra}
"""From each older format to the one after it."""


def _as_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a reader will see it: `dataclasses.asdict` would take seconds for thousands of ranks."""
    content = {item.name: getattr(manifest, item.name) for item in fields(manifest)}
    content["files"] = [vars(entry) for entry in manifest.files]
    chunks = {name: [vars(chunk) for chunk in entry.chunks] for name, entry in manifest.tensors.items()}
    content["tensors"] = {name: vars(entry) | {"chunks": chunks[name]} for name, entry in manifest.tensors.items()}
    # The user's values go through JSON once, since keys that become strings would sort differently.
    return content | {key: json.loads(json.dumps(content[key])) for key in _TABLES}


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sealed(canonical: str) -> str:
    """The text of a file that holds the JSON object `canonical` and, as its last key, the sha256 of that text."""
    return f'{canonical[:-1]},"sha256":"{hashlib.sha256(canonical.encode()).hexdigest()}"}}\n'


def _parse(content: dict[str, Any]) -> Manifest:
    files = tuple(_parse_file(entry) for entry in content["files"])
    room = Room({entry.name: entry.bytes for entry in files})
    if len(room.left) != len(files):
        raise ValueError(f"{len(files)} files have {len(room.left)} different names")
    tensors = {text(name): _parse_tensor(name, entry, room) for name, entry in content["tensors"].items()}
    values: dict[str, Any] = {key: natural(content[key]) for key in ("step", "samples", "tokens", "world_size")}
    values |= {key: text(content[key]) for key in ("run_id", "strategy")}
    values |= {key: table(content[key]) for key in _TABLES}
    for version in values["versions"].values():
        text(version)
    return Manifest(files=files, tensors=tensors, **values)


def _parse_file(entry: dict[str, Any]) -> FileEntry:
    name = matching(_FILE_NAME, entry["name"], "a plain *.safetensors name")
    return FileEntry(name, natural(entry["bytes"]), matching(_CRC32, entry["crc32"], "eight hexadecimal digits"))


def _parse_tensor(name: str, entry: dict[str, Any], room: Room) -> TensorEntry:
    dtype, shape, chunks, covered = entry["dtype"], naturals(entry["shape"]), [], 0
    if dtype not in STORED_DTYPES or len(shape) > _MOST_DIMS:
        raise ValueError(f"{name}: cannot be {shortened(dtype)} of {len(shape)} dims, at most {_MOST_DIMS}")
    for found in entry["chunks"]:
        offsets, sizes = naturals(found["offsets"]), naturals(found["sizes"])
        if not inside(offsets, sizes, shape):
            raise ValueError(f"{name}: region {shortened(offsets)}+{shortened(sizes)} lies outside shape {shape}")
        volume = math.prod(sizes)
        covered += volume
        place = room.take(name, found["file"], found["key"], volume * STORED_DTYPES[dtype][1])
        chunks.append(Chunk(*place, offsets, sizes))
    if covered != math.prod(shape):
        raise ValueError(f"{name}: regions hold {covered} elements, shape {shape} has {math.prod(shape)}")
    if not tiles([(chunk.offsets, chunk.sizes) for chunk in chunks], shape):
        raise ValueError(f"{name}: regions overlap")
    return TensorEntry(dtype, shape, tuple(chunks))
