"""Choosing, verifying and loading checkpoints. Nothing is used before every one of its bytes was checked.

All functions are collective over the default process group; one process needs no group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner

from disttrain.checkpoint.agreement import on_rank_zero, raise_together, rank_and_world
from disttrain.checkpoint.dcp_io import SafetensorsReader, dcp_errors, quiet_dcp
from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.manifest import Manifest
from disttrain.checkpoint.state import differences, fits, is_optional, model_state
from disttrain.checkpoint.storage import Storage
from disttrain.errors import UserError


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose every byte was verified, and why newer ones were passed over (one line each)."""

    name: str
    place: str
    manifest: Manifest
    rejected: tuple[str, ...] = ()


class CheckpointReader:
    """The checkpoints in `storage`, seen by every rank."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint that verifies: manifest, then header, size and crc32 of every file, shared out.

        None when nothing was ever committed. Raises UserError when there are checkpoints but none is sound: starting
        over in silence would lose a run.
        """
        rejected: list[str] = []
        for name in on_rank_zero(self.storage.committed):
            try:
                return CheckpointInfo(name, self.storage.place(name), self.verified(name), tuple(rejected))
            except UserError as error:
                rejected.extend(error.problems)
        if rejected:
            remedy = "no checkpoint here can be loaded; restore one, or move them away to start again"
            raise UserError([*rejected, f"{self.storage.place('')}: {remedy}"])
        return None

    def verified(self, name: str) -> Manifest:
        """The manifest, once the ranks together have read every file; UserError on every rank if any is damaged."""
        rank, world = rank_and_world()
        manifest, problems = None, []
        try:
            manifest = self.storage.read_manifest(name)
            mine = manifest.files[rank::world]
            problems = [problem for entry in mine if (problem := self.storage.verify(name, manifest, entry))]
        except UserError as error:
            problems = list(error.problems)
        raise_together(problems)
        assert manifest is not None
        return manifest

    def load(self, state: Mapping[str, Tensor], info: CheckpointInfo) -> list[str]:
        """Fill the tensors of `state` in place, at whatever layout they have now.

        Returns lines about optional tensors (`state.is_optional`) that only one side has: those of `state` are left
        alone. Raises UserError on every rank, before touching anything, when other names, shapes or dtypes differ.
        Under FSDP2 the caller must reshard its modules afterwards, or the next forward may still use old weights.
        """
        problems = [f"{info.place}: {problem}" for problem in differences(state, info.manifest)]
        if problems and all(": optim." in problem or ": ... and" in problem for problem in problems):
            problems.append(
                "the optimizer's algorithms or state types are not those of the checkpoint: undo the change, or start "
                f"a new run from its weights alone with train.init_from={info.place}"
            )
        raise_together(problems)
        stored = info.manifest.tensors
        # An optional one of another shape is a history of another length: it starts anew.
        kept = {name: tensor for name, tensor in state.items() if name in stored and fits(tensor, stored[name])}
        targets = {name: tensor.detach() for name, tensor in kept.items()}
        reader = SafetensorsReader(self.storage, info.name, info.manifest)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        with dcp_errors(), quiet_dcp():
            dcp.load(targets, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())
        new = [name for name in state if name not in kept]
        old = [name for name in stored if is_optional(name) and name not in state]
        return [f"{names} not in {info.place}: starts anew" for names in _by_owner(new)] + [
            f"{names} of {info.place}: no longer kept" for names in _by_owner(old)
        ]

    def load_weights(self, target: nn.Module | Mapping[str, Tensor], info: CheckpointInfo) -> None:
        """`load` for the weights of a model (plain, DDP or FSDP2), or what `model_state` gives, and nothing else."""
        weights = {name: entry for name, entry in info.manifest.tensors.items() if name.startswith("model.")}
        state = model_state(target) if isinstance(target, nn.Module) else target
        self.load(state, replace(info, manifest=replace(info.manifest, tensors=weights)))


def _by_owner(names: list[str]) -> list[str]:
    """`service.OWNER.KEY`, or how many of an owner's."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return [own[0] if len(own) == 1 else f"{owner} ({len(own)} of it)" for owner, own in owners.items()]


def open_checkpoint(path: Path) -> tuple[CheckpointReader, CheckpointInfo]:
    """The newest checkpoint that verifies of the run folder at `path`, or the checkpoint whose directory it is.

    Raises UserError when there is none, or when the one named is damaged.
    """
    if (path / "manifest.json").exists():
        reader = CheckpointReader(LocalStorage(path.parent))
        return reader, CheckpointInfo(path.name, str(path), reader.verified(path.name))
    reader = CheckpointReader(LocalStorage(path / "checkpoints"))
    found = reader.latest()
    if found is None:
        remedy = "name a run folder that has saved one, or a step in it"
        raise UserError(f"{path / 'checkpoints'}: no checkpoint that verifies; {remedy}")
    return reader, found
