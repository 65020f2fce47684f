"""A finished or running run, opened by one plain process: for generate and evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from disttrain.config import RunConfig, load_config
from disttrain.errors import UserError
from disttrain.train.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from disttrain.models import GPT


@dataclass(frozen=True)
class SavedRun:
    config: RunConfig
    folder: RunFolder
    model: GPT
    device: torch.device
    step: int


def open_run(path: Path, device: str | None = None) -> SavedRun:
    """The newest checkpoint of the run folder `path` that verifies, as a plain model; UserError without one."""
    if device not in (None, "auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: must be cpu, cuda or auto")
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"{path}: no config.json here, so this is no run folder; name one, for example runs/quickstart")
    config = load_config(path, [], check_layout=False).config

    from disttrain.checkpoint.reading import open_checkpoint
    from disttrain.distributed.process_group import select_device
    from disttrain.train.build import build_gpt

    reader, found = open_checkpoint(path)
    place = select_device(device or config.device)
    model = build_gpt(config.model, config.train.sequence_length, place)
    reader.load_weights(model, found)
    return SavedRun(config, folder, model.eval(), place, found.manifest.step)
