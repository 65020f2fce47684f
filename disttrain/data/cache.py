"""Files that are made once, whole, however many processes ask for them at the same time."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from disttrain.errors import UserError


def make_once(path: Path, content: Callable[[], bytes]) -> Path:
    """Return `path`, after writing `content()` there if no process has done so yet.

    Raises `UserError` when the directory cannot be written.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            if not path.exists():
                write_atomic(path, content())
    except OSError as error:
        raise UserError(
            f"cache file {path}: cannot be written ({error.strerror or error}); "
            "free some space there or choose another cache directory"
        ) from error
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write `path` through a neighbour and a rename, so that no reader ever sees half a file."""
    neighbour = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with neighbour.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        # A file system without locks costs repeated work and no more: the rename keeps the result whole.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
