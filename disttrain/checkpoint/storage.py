"""Where checkpoints lie, as an interface: what the manager needs of a disk, or later of an object store.

The manifest is the commit: a checkpoint is there when its manifest can be read, and until then nobody sees its files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from disttrain.checkpoint.manifest import FileEntry, Manifest
from disttrain.checkpoint.tensor_file import Box


def step_name(step: int) -> str:
    """The name of the checkpoint of `step`, such that names sort as steps do."""
    return f"step-{step:08d}"


class TensorFile(Protocol):
    """One data file, open for reading."""

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], like: Tensor) -> Tensor:
        """A copy of one region of the tensor under `key`; ValueError unless it has the dtype of `like`."""
        ...


class Storage(Protocol):
    """Checkpoints of one run, by name (`step-00000100`). What cannot be done raises StorageError in words.

    `begin`, `commit`, `abort` and `remove` are called on rank 0 only, the others on any rank and from any thread.
    """

    def committed(self) -> list[str]:
        """The names of the committed checkpoints, newest first."""
        ...

    def place(self, name: str) -> str:
        """Where it lies, for people."""
        ...

    def begin(self, name: str) -> str:
        """Clear what interrupted saves left and open a new attempt at `name`; returns the attempt's own name."""
        ...

    def write(self, attempt: str, file: str, boxes: Sequence[Box], header: Mapping[str, str]) -> FileEntry:
        """Write one data file of an attempt; when this returns, its bytes survive a power cut."""
        ...

    def commit(self, attempt: str, name: str, manifest: Manifest) -> None:
        """Make the attempt the checkpoint `name`, all or nothing, in the place of a damaged one of that name."""
        ...

    def abort(self, attempt: str) -> None:
        """Drop an attempt; never raises."""
        ...

    def read_manifest(self, name: str) -> Manifest:
        """The checked manifest; UserError when it is damaged."""
        ...

    def missing(self, name: str, manifest: Manifest) -> list[str]:
        """What a look at the files' sizes finds wrong, in words; reads no data."""
        ...

    def verify(self, name: str, manifest: Manifest, entry: FileEntry) -> str | None:
        """Read all of one data file: None when every byte is right, otherwise the problem in words."""
        ...

    def open(self, name: str, file: str) -> AbstractContextManager[TensorFile]:
        """Open a verified data file."""
        ...

    def remove(self, name: str) -> None:
        """Delete a committed checkpoint; cut short anywhere, it never looks like one."""
        ...

    def free_bytes(self) -> int | None:
        """Room that is left, None where it cannot be known."""
        ...
