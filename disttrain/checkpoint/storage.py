"""Safetensors files under the planner of torch's distributed checkpoint (DCP): tensors only, no pickle.

The planner decides which rank writes or reads which box of which tensor; here the boxes meet the files.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from disttrain.checkpoint.manifest import Chunk, FileEntry, Manifest, TensorEntry, fsync_directory
from disttrain.checkpoint.tensor_file import DTYPES, SAFETENSORS_NAMES, read_region, write_safetensors
from disttrain.errors import UserError


class SafetensorsWriter(StorageWriter):
    """Writes each rank's boxes to `directory/rank-RRRRR.safetensors`; rank 0 then has `files` and `tensors`.

    The coordinator creates `directory`, which every rank must see. `header` goes into each file's metadata. Nothing
    is committed here: the caller writes the manifest and renames the directory.
    """

    def __init__(self, directory: Path, header: Mapping[str, str]) -> None:
        self.directory = directory
        self.header = dict(header)
        self.rank = 0
        self.files: tuple[FileEntry, ...] = ()
        self.tensors: dict[str, TensorEntry] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to reset: one writer writes one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """DCP asks this only when it chooses a storage by itself."""
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Note the rank that DCP gives; the coordinator makes the directory before anybody writes."""
        self.rank = kwargs.get("rank", 0)
        if is_coordinator:
            self.directory.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what is not a tensor of a known dtype, before any rank writes. Raises UserError."""
        problems = [problem for item in plan.items if (problem := _unsupported(item))]
        if problems:
            raise UserError(problems)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Keep the planner's distribution of boxes over ranks."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's boxes to one file. Raises UserError when the disk refuses."""
        # Ranks beyond a tensor's rows hold empty boxes, which need no bytes.
        items = [item for item in plan.items if item.tensor_data and item.tensor_data.chunk.sizes.numel()]
        keys = [_key(item) for item in items]
        results: list[WriteResult] = []
        if items:
            path = self.directory / f"rank-{self.rank:05d}.safetensors"
            boxes = {key: _tensor(planner.resolve_data(item)) for key, item in zip(keys, items, strict=True)}
            entry = write_safetensors(path, boxes, self.header)
            sizes = [box.nbytes for box in boxes.values()]
            results = [
                WriteResult(i.index, size, (entry, key)) for i, size, key in zip(items, sizes, keys, strict=True)
            ]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: turn what all ranks wrote into the manifest's entries."""
        written = [result for of_rank in results for result in of_rank]
        self.files = tuple(sorted({result.storage_data[0] for result in written}, key=lambda entry: entry.name))
        places = {
            (r.index.fqn, tuple(r.index.offset or ())): (r.storage_data[0].name, r.storage_data[1]) for r in written
        }
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)  # prepare_local_plan let nothing else through
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks if chunk.sizes.numel()]
            chunks = tuple(Chunk(*places[name, offsets], offsets, sizes) for offsets, sizes in boxes)
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            self.tensors[name] = TensorEntry(dtype, tuple(tensor.size), chunks)
        fsync_directory(self.directory)


class SafetensorsReader(StorageReader):
    """Reads the boxes that a load plan asks for; each file is opened once, only the asked regions are copied.

    Pass a manifest that `read_manifest` checked, and verify the files first: this class checks no checksums.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.places = {
            (name, chunk.offsets): chunk for name, entry in manifest.tensors.items() for chunk in entry.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to reset: one reader reads one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """DCP asks this only when it chooses a storage by itself."""
        return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest in DCP's terms."""
        tensors: dict[str, STORAGE_TYPES] = {}
        for name, entry in self.manifest.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            properties = TensorProperties(dtype=DTYPES[entry.dtype])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        return Metadata(state_dict_metadata=tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Keep the planner's choice of regions."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Keep the planner's choice of regions."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every asked region into its target. Raises UserError when a file does not hold what was promised."""
        by_file: dict[str, list[tuple[ReadItem, Chunk]]] = defaultdict(list)
        for item in plan.items:
            chunk = self.places[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            by_file[chunk.file].append((item, chunk))
        for name, wanted in by_file.items():
            path = self.directory / name
            try:
                with safe_open(path, framework="pt") as file:
                    for item, chunk in wanted:
                        target = planner.resolve_tensor(item).detach()
                        offsets, sizes = tuple(item.storage_offsets), tuple(item.lengths)
                        target.copy_(read_region(file, chunk.key, offsets, sizes, target.dtype))
                        planner.commit_tensor(item, target)
            except (OSError, ValueError, SafetensorError) as error:
                raise UserError(f"{path}: cannot read: {error}; use another checkpoint") from None
        return _done(None)


@contextmanager
def dcp_errors() -> Iterator[None]:
    """Turn DCP's gathered failures, the same on every rank, into one UserError (or RuntimeError for a defect)."""
    try:
        yield
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        if not all(isinstance(cause, UserError | OSError) for cause in causes.values()):
            raise RuntimeError(str(error)) from error
        raise UserError(_by_problem(causes)) from error


def _by_problem(causes: Mapping[int, BaseException]) -> list[str]:
    """One line for each distinct problem, with the ranks that have it; a full disk can have a thousand."""
    ranks_of: dict[str, list[str]] = defaultdict(list)
    for rank, cause in causes.items():
        for problem in cause.problems if isinstance(cause, UserError) else [str(cause)]:
            ranks_of[problem].append(str(rank))
    lines = [f"rank {', '.join(ranks[:8])}{', ...' * (len(ranks) > 8)}: {text}" for text, ranks in ranks_of.items()]
    return lines if len(lines) <= 8 else [*lines[:8], f"... and {len(lines) - 8} more like this"]


def _unsupported(item: WriteItem) -> str | None:
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        return f"{item.index.fqn}: not a tensor; a checkpoint stores tensors only: make it one or put it in the config"
    dtype = item.tensor_data.properties.dtype
    if dtype not in SAFETENSORS_NAMES:
        return f"{item.index.fqn}: {dtype} cannot be stored; supported: {', '.join(DTYPES)}"
    return None


def _key(item: WriteItem) -> str:
    """The tensor's own name when the box is all of it, otherwise the name with the box: `name[2:4,0:8]`."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if chunk.sizes == item.tensor_data.size:
        return item.index.fqn
    return f"{item.index.fqn}[{','.join(f'{o}:{o + n}' for o, n in zip(chunk.offsets, chunk.sizes, strict=True))}]"


def _tensor(data: Any) -> Tensor:
    assert isinstance(data, Tensor)
    return data.detach()


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
