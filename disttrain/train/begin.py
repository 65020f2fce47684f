"""Where a run begins: at its newest checkpoint, at the weights of another run, or at drawn ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from disttrain.checkpoint.manager import CheckpointManager
from disttrain.checkpoint.manifest import Manifest
from disttrain.checkpoint.reading import open_checkpoint
from disttrain.config import RunConfig
from disttrain.train.batches import RunBatches, begin_batches, resume_batches
from disttrain.train.build import Training


def begin_run(
    config: RunConfig, parts: Training, manager: CheckpointManager, state: Mapping[str, Tensor], world: int
) -> tuple[Manifest | None, RunBatches, list[str]]:
    """Load the newest checkpoint that verifies into `state`: what it says of itself, the batches, and what to tell.

    Collective. Raises UserError on every rank when there are checkpoints and none can be used.
    """
    found = manager.latest()
    if found is None:
        return None, begin_batches(config, world), _initial_weights(config, parts)
    notes = [*found.rejected, *manager.load(state, found)]
    parts.engine.loaded()
    manifest = found.manifest
    notes.append(f"resumed from {found.place} (step {manifest.step})")
    batches, changes = resume_batches(config, world, manifest.tokens, manifest.extra)
    return manifest, batches, notes + changes


def _initial_weights(config: RunConfig, parts: Training) -> list[str]:
    """The weights that `train.init_from` names, in place of drawn ones."""
    source = config.train.init_from
    if source is None:
        return []
    reader, found = open_checkpoint(Path(source).expanduser())
    reader.load_weights(parts.engine.weights(), found)
    parts.engine.weights_changed()
    return [*found.rejected, f"weights from {found.place} (step {found.manifest.step}); everything else is new"]
