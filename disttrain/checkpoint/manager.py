"""Saving, choosing and loading checkpoints: the one place that commits, deletes and decides.

All functions are collective over the default process group; one process needs no group.
"""

from __future__ import annotations

import platform
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner

from disttrain import __version__
from disttrain.checkpoint.agreement import on_rank_zero, raise_together, rank_and_world
from disttrain.checkpoint.manifest import (
    Manifest,
    committed_steps,
    fsync_directory,
    read_manifest,
    step_directory,
    verify_file,
    write_manifest,
)
from disttrain.checkpoint.state import differences, model_state
from disttrain.checkpoint.storage import SafetensorsReader, SafetensorsWriter, dcp_errors
from disttrain.errors import UserError


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose every byte was verified, and why newer ones were passed over (one line each)."""

    directory: Path
    manifest: Manifest
    rejected: tuple[str, ...]


class CheckpointManager:
    """The checkpoints of one run, in `directory` (the run folder's `checkpoints/`), seen by every rank.

    `keep_last` is at least 1; `run_id` must stay the same when the run resumes. One process group at a time.
    """

    def __init__(self, directory: Path, keep_last: int, run_id: str) -> None:
        if keep_last < 1:
            raise UserError(f"checkpoint.keep_last: {keep_last} would delete every checkpoint; use 1 or more")
        self.directory = directory
        self.keep_last = keep_last
        self.run_id = run_id

    def save(
        self,
        state: Mapping[str, Tensor],
        step: int,
        samples: int,
        tokens: int,
        config: dict[str, Any],
        data: dict[str, Any],
        strategy: str,
    ) -> Path:
        """Write `state` (names to plain tensors or DTensors, each tensor once) and commit it; returns its directory.

        All data is on disk before the manifest, the manifest before the one rename that commits; older checkpoints
        beyond `keep_last` go only after that. A step that this run committed before, and that still verifies, is
        not written again. Raises UserError on every rank when any rank cannot write; nothing older is touched.
        """
        target = step_directory(self.directory, step)
        if self._already_committed(target):
            return target
        temporary = self.directory / on_rank_zero(lambda: self._prepare(target))
        writer = SafetensorsWriter(temporary, {"run_id": self.run_id, "step": str(step)})
        about: dict[str, Any] = {"step": step, "samples": samples, "tokens": tokens, "world_size": rank_and_world()[1]}
        about |= {"run_id": self.run_id, "strategy": strategy, "config": config, "data": data, "versions": _versions()}
        try:
            _dcp_save(state, writer)
            on_rank_zero(
                lambda: _commit(temporary, target, Manifest(files=writer.files, tensors=writer.tensors, **about))
            )
        except BaseException:
            if rank_and_world()[0] == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if rank_and_world()[0] == 0:
            self._delete_old(target)
        return target

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint that verifies: manifest, sizes and crc32 of every file, shared out over the ranks.

        None when nothing was ever committed. Raises UserError when there are checkpoints but none is sound: starting
        over in silence would lose a run.
        """
        rejected: list[str] = []
        for name in on_rank_zero(lambda: [path.name for path in committed_steps(self.directory)]):
            try:
                return CheckpointInfo(self.directory / name, _verified(self.directory / name), tuple(rejected))
            except UserError as error:
                rejected.extend(error.problems)
        if rejected:
            remedy = "no checkpoint here can be loaded; restore one, or move them away to start again"
            raise UserError([*rejected, f"{self.directory}: {remedy}"])
        return None

    def load(self, state: Mapping[str, Tensor], info: CheckpointInfo) -> None:
        """Fill the tensors of `state` in place, at whatever layout they have now.

        Raises UserError on every rank, before touching anything, when names, shapes or dtypes differ. Under FSDP2 the
        caller must reshard its modules afterwards, or the next forward may still use unsharded old weights.
        """
        _load(state, info.directory, info.manifest)

    def _already_committed(self, target: Path) -> bool:
        if not on_rank_zero(lambda: target in committed_steps(self.directory)):
            return False
        try:
            manifest = _verified(target)
        except UserError:
            return False  # a damaged checkpoint of this step is replaced
        if manifest.run_id != self.run_id:
            raise UserError(f"{target}: belongs to run {manifest.run_id}, not {self.run_id}; use another run.dir")
        return True

    def _prepare(self, target: Path) -> str:
        """On rank 0: clear what interrupted saves left behind and choose the name to write under."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for stray in self.directory.glob("step-*.tmp-*"):
            shutil.rmtree(stray, ignore_errors=True)
        return f"{target.name}.tmp-{secrets.token_hex(4)}"

    def _delete_old(self, newest: Path) -> None:
        """On rank 0: keep `newest` and the `keep_last - 1` before it; later steps, passed over once, stay."""
        older = [path for path in committed_steps(self.directory) if path < newest]
        for path in older[self.keep_last - 1 :]:
            _remove(path)


def load_weights(directory: Path, model: nn.Module) -> Manifest:
    """Verify the checkpoint in `directory` and fill `model` (plain, DDP or FSDP2) from it, without optimizer state.

    Returns the manifest. Raises UserError when a byte is wrong or names, shapes or dtypes differ. Under FSDP2 the
    caller must reshard its modules afterwards.
    """
    manifest = _verified(directory)
    weights = {name: entry for name, entry in manifest.tensors.items() if name.startswith("model.")}
    _load(model_state(model), directory, replace(manifest, tensors=weights))
    return manifest


def _verified(directory: Path) -> Manifest:
    """The manifest, once the ranks together have read every file; UserError on every rank if any found a problem."""
    rank, world = rank_and_world()
    manifest, problems = None, []
    try:
        manifest = read_manifest(directory)
        problems = [problem for entry in manifest.files[rank::world] if (problem := verify_file(directory, entry))]
    except UserError as error:
        problems = list(error.problems)
    raise_together(problems)
    assert manifest is not None
    return manifest


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "disttrain": __version__, "python": platform.python_version()}


def _dcp_save(state: Mapping[str, Tensor], writer: SafetensorsWriter) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with dcp_errors(), _quiet():
        dcp.save(dict(state), storage_writer=writer, planner=planner, no_dist=not dist.is_initialized())


def _load(state: Mapping[str, Tensor], directory: Path, manifest: Manifest) -> None:
    raise_together([f"{directory}: {problem}" for problem in differences(state, manifest)])
    targets = {name: tensor.detach() for name, tensor in state.items()}
    reader = SafetensorsReader(directory, manifest)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    with dcp_errors(), _quiet():
        dcp.load(targets, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide DCP's warning that one process without a group is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _commit(temporary: Path, target: Path, manifest: Manifest) -> None:
    write_manifest(temporary, manifest)
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    if target.exists():  # damaged, or it would have been kept
        target.rename(replaced)
    temporary.rename(target)
    fsync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(directory: Path) -> None:
    """Delete a committed checkpoint; renamed first, so that half a deletion never looks like a checkpoint."""
    doomed = directory.with_name(f"{directory.name}.tmp-deleted")
    try:
        directory.rename(doomed)
    except OSError as error:
        warnings.warn(f"{directory}: cannot delete the old checkpoint: {error.strerror}", stacklevel=2)
    shutil.rmtree(doomed, ignore_errors=True)
