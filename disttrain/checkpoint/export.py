"""A checkpoint's weights as one safetensors file for other programs: verified first, then copied tensor by tensor."""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from disttrain.checkpoint.manifest import MANIFEST_NAME, Manifest, TensorEntry, fsync_directory, read_manifest
from disttrain.checkpoint.tensor_file import DTYPES, Box, read_region, write_safetensors
from disttrain.checkpoint.verification import verify_files
from disttrain.errors import StorageError, UserError

PREFIX = "model."


class DamagedCheckpointError(UserError):
    """The checkpoint does not verify: another one may."""


@dataclass(frozen=True)
class Exported:
    """What was written; `parameters` counts numbers, those of persistent buffers included."""

    path: Path
    run_id: str
    step: int
    tensors: int
    parameters: int
    bytes: int


def export_weights(directory: Path, out: Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> Exported:
    """Write the weights of the checkpoint in `directory` to the safetensors file `out`, all of it or nothing.

    Every byte is verified before a weight is used (DamagedCheckpointError otherwise). Tensors have the model's own
    names; a tied head is stored once, under the embedding's. Floating-point tensors become `dtype`, others keep theirs.
    Host memory holds one tensor at a time. Raises UserError for an `out` that exists (unless `overwrite`) and for a
    finite value that `dtype` cannot hold, StorageError when the disk refuses.
    """
    _check_target(out, overwrite)
    manifest = _verified(directory)
    weights = {name: entry for name, entry in manifest.tensors.items() if name.startswith(PREFIX)}
    if not weights:
        raise UserError(f"{directory}: no tensor of its {len(manifest.tensors)} is a weight ({PREFIX}NAME)")
    source = _Source(directory, {})
    boxes = [
        Box(name.removeprefix(PREFIX), wanted, entry.shape, partial(source.whole, name, entry, wanted))
        for name, entry in weights.items()
        for wanted in [_wanted(entry, dtype)]
    ]
    _check_space(out, sum(box.nbytes for box in boxes))
    written_bytes = _write(out, boxes, _header(manifest))
    numbers = sum(math.prod(entry.shape) for entry in weights.values())
    return Exported(out, manifest.run_id, manifest.step, len(weights), numbers, written_bytes)


@dataclass(frozen=True)
class _Source:
    """The data files of a checkpoint; mapped into memory once each, which needs no open descriptor."""

    directory: Path
    opened: dict[str, Any]

    def whole(self, name: str, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        """One tensor put together from its boxes, as `dtype`."""
        whole = torch.empty(entry.shape, dtype=dtype)
        for chunk in entry.chunks:
            path = self.directory / chunk.file
            corner = (0,) * len(chunk.sizes)
            try:
                if chunk.file not in self.opened:
                    self.opened[chunk.file] = safe_open(path, framework="pt").__enter__()
                stored = read_region(self.opened[chunk.file], chunk.key, corner, chunk.sizes, DTYPES[entry.dtype])
            except (OSError, ValueError, SafetensorError) as error:
                raise StorageError(f"{path}: cannot read: {error}; use another checkpoint") from None
            part = whole[tuple(slice(start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True))]
            part.copy_(stored)
            if part.dtype != stored.dtype and (lost := int((stored.isfinite() & ~part.isfinite()).sum())):
                limit = f"{lost:,} values are beyond {torch.finfo(dtype).max:.5g}, the largest {_plain(dtype)}"
                raise UserError(f"{path}: {name}: {limit}; use a wider --dtype")
        return whole


def _check_target(out: Path, overwrite: bool) -> None:
    try:
        problem = _target_problem(out, overwrite)
    except OSError as error:
        problem = f"{error.strerror}; use another name or directory"
    if problem:
        raise UserError(f"{out}: {problem}")


def _target_problem(out: Path, overwrite: bool) -> str | None:
    if out.is_dir():
        return "is a directory; name a file in it"
    if not out.parent.is_dir():
        return f"there is no directory {out.parent}; make it first"
    if (out.parent / MANIFEST_NAME).exists():
        return "lies inside a checkpoint, which must stay as it was saved; write somewhere else"
    if out.exists() and not overwrite:
        return f"exists ({out.stat().st_size:,} bytes); use another name, or --force to replace it"
    return None


def _verified(directory: Path) -> Manifest:
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        raise DamagedCheckpointError(error.problems) from None
    if problems := verify_files(directory, manifest):
        raise DamagedCheckpointError(problems)
    return manifest


def _wanted(entry: TensorEntry, dtype: torch.dtype | None) -> torch.dtype:
    stored = DTYPES[entry.dtype]
    return dtype if dtype is not None and stored.is_floating_point else stored


def _check_space(out: Path, needed_bytes: int) -> None:
    """Before hours of writing; what a quota or another program takes is found by the write itself."""
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < needed_bytes:
        arithmetic = f"{needed_bytes:,} bytes needed, {free_bytes:,} bytes free"
        raise StorageError(f"{out}: cannot write: {arithmetic}; free space, use another disk or a narrower --dtype")


def _write(out: Path, boxes: list[Box], header: Mapping[str, str]) -> int:
    """Write under a temporary name beside `out`, then rename; returns the bytes of the file."""
    temporary = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        entry = write_safetensors(temporary, boxes, header)
        try:
            temporary.rename(out)
            fsync_directory(out.parent)
        except OSError as error:
            raise StorageError(f"{out}: cannot write: {error.strerror}; use another name or directory") from error
    finally:
        temporary.unlink(missing_ok=True)
    return entry.bytes


def _header(manifest: Manifest) -> dict[str, str]:
    about = {"run_id": manifest.run_id, "step": str(manifest.step), "config": json.dumps(manifest.config)}
    return {"format": "pt"} | about


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
