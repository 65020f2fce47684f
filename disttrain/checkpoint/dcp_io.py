"""Our files under the planner of torch's distributed checkpoint (DCP): tensors only, no pickle.

The planner decides which rank writes or reads which box of which tensor; here the boxes meet the files.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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

from disttrain.checkpoint.manifest import Chunk, Manifest, TensorEntry
from disttrain.checkpoint.storage import Storage
from disttrain.checkpoint.tensor_file import DTYPES, SAFETENSORS_NAMES
from disttrain.errors import UserError


class PlanRecorder(StorageWriter):
    """Writes nothing: keeps what the planner decided.

    Afterwards `items` are the boxes that this rank has to write to `file`, and on rank 0 `tensors` says where all lie.
    """

    def __init__(self) -> None:
        self.file = ""
        self.items: dict[str, WriteItem] = {}
        self.tensors: dict[str, TensorEntry] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to reset: one writer writes one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """DCP asks this only when it chooses a storage by itself."""
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Name this rank's file by the rank that DCP gives."""
        self.file = f"rank-{kwargs.get('rank', 0):05d}.safetensors"

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
        """Name this rank's boxes; those of ranks beyond a tensor's rows are empty and need no bytes."""
        kept = [item for item in plan.items if item.tensor_data and item.tensor_data.chunk.sizes.numel()]
        self.items = {_key(item): item for item in kept}
        return _done([WriteResult(item.index, 0, (self.file, key)) for key, item in self.items.items()])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0: turn what all ranks gathered into the manifest's entries."""
        written = [result for of_rank in results for result in of_rank]
        places: dict[Any, tuple[str, str]] = {
            (r.index.fqn, tuple(r.index.offset or ())): r.storage_data for r in written
        }
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)  # prepare_local_plan let nothing else through
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks if chunk.sizes.numel()]
            chunks = tuple(Chunk(*places[name, offsets], offsets=offsets, sizes=sizes) for offsets, sizes in boxes)
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            self.tensors[name] = TensorEntry(dtype, tuple(tensor.size), chunks)


class SafetensorsReader(StorageReader):
    """Reads the boxes that a load plan asks for; each file is opened once, only the asked regions are copied.

    Pass a manifest that `read_manifest` checked, and verify the files first: this class checks no checksums.
    """

    def __init__(self, storage: Storage, name: str, manifest: Manifest) -> None:
        self.storage = storage
        self.name = name
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
            with self.storage.open(self.name, name) as file:
                for item, chunk in wanted:
                    target = planner.resolve_tensor(item).detach()
                    offsets, sizes = tuple(item.storage_offsets), tuple(item.lengths)
                    target.copy_(file.read(chunk.key, offsets, sizes, target))
                    planner.commit_tensor(item, target)
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
        problems = {
            rank: cause.problems if isinstance(cause, UserError) else (str(cause),) for rank, cause in causes.items()
        }
        raise UserError(_by_problem(problems)) from error


@contextmanager
def quiet_dcp() -> Iterator[None]:
    """Hide DCP's warning that one process without a group is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _by_problem(problems_of_ranks: Mapping[int, Sequence[str]]) -> list[str]:
    """One line for each distinct problem, with the ranks that have it; a full disk can have a thousand."""
    ranks_of: dict[str, list[str]] = defaultdict(list)
    for rank, problems in sorted(problems_of_ranks.items()):
        for problem in problems:
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


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
