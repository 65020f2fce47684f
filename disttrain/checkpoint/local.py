"""Checkpoints in a directory that every rank sees: written under a temporary name, committed by one rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from disttrain.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    committed_steps,
    fsync_directory,
    read_manifest,
    to_bytes,
    write_bytes,
)
from disttrain.checkpoint.tensor_file import Box, disk_problem, read_region, write_safetensors
from disttrain.checkpoint.verification import missing_bytes, verify_file
from disttrain.errors import StorageError


class LocalStorage:
    """`directory` is the run folder's `checkpoints/`; it is made when the first save begins."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def committed(self) -> list[str]:
        return [path.name for path in committed_steps(self.directory)]

    def place(self, name: str) -> str:
        return str(self.directory / name)

    def begin(self, name: str) -> str:
        attempt = f"{name}.tmp-{secrets.token_hex(4)}"
        with _in_words(self.directory / attempt):
            self.directory.mkdir(parents=True, exist_ok=True)
            for stray in self.directory.glob("step-*.tmp-*"):
                shutil.rmtree(stray, ignore_errors=True)
            (self.directory / attempt).mkdir()
        return attempt

    def write(self, attempt: str, file: str, boxes: Sequence[Box], header: Mapping[str, str]) -> FileEntry:
        return write_safetensors(self.directory / attempt / file, boxes, header)

    def commit(self, attempt: str, name: str, manifest: Manifest) -> None:
        temporary, target = self.directory / attempt, self.directory / name
        replaced = self.directory / f"{attempt}-replaced"
        content = to_bytes(manifest)
        with _in_words(temporary / MANIFEST_NAME, len(content)):
            write_bytes(temporary, content)
            if target.exists():  # damaged, or it would have been kept
                target.rename(replaced)
            temporary.rename(target)
            fsync_directory(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def abort(self, attempt: str) -> None:
        shutil.rmtree(self.directory / attempt, ignore_errors=True)

    def read_manifest(self, name: str) -> Manifest:
        return read_manifest(self.directory / name)

    def missing(self, name: str, manifest: Manifest) -> list[str]:
        return missing_bytes(self.directory / name, manifest)

    def verify(self, name: str, manifest: Manifest, entry: FileEntry) -> str | None:
        return verify_file(self.directory / name, manifest, entry)

    @contextmanager
    def open(self, name: str, file: str) -> Iterator[LocalTensorFile]:
        path = self.directory / name / file
        try:
            with safe_open(path, framework="pt") as opened:
                yield LocalTensorFile(opened)
        except (OSError, ValueError, SafetensorError) as error:
            raise StorageError(f"{path}: cannot read: {error}; use another checkpoint") from None

    def remove(self, name: str) -> None:
        doomed = self.directory / f"{name}.tmp-deleted"
        with _in_words(self.directory / name):
            (self.directory / name).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def free_bytes(self) -> int | None:
        there = next((path for path in (self.directory, *self.directory.parents) if path.is_dir()), None)
        return shutil.disk_usage(there).free if there else None


class LocalTensorFile:
    """A safetensors file that safetensors has mapped into memory."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], like: Tensor) -> Tensor:
        return read_region(self._file, key, offsets, sizes, like.dtype)


@contextmanager
def _in_words(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn what the operating system refuses into one line about `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(disk_problem(Path(os.fspath(error.filename or path)), error, needed_bytes)) from error
