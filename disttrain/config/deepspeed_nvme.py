"""What DeepSpeed is told where parameters wait on a disk. No torch here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from disttrain.config.run import RunConfig

PART_ELEMENTS = 10**8
"""Elements that go to the disk together after an update, through memory of that size; the smallest that hold it."""
BUFFERS = 5
"""DeepSpeed's number: matrices that a process holds or reads ahead at once."""


def swap_folder(config: RunConfig) -> Path | None:
    """The folder that belongs to this run alone: DeepSpeed names files by their ranks only."""
    if config.deepspeed.nvme_path is None:
        return None
    run = config.run_dir.resolve()
    name = f"{run.name}-{hashlib.blake2b(str(run).encode(), digest_size=4).hexdigest()}"
    return Path(config.deepspeed.nvme_path).expanduser().resolve() / name


def disk_settings(config: RunConfig, world: int) -> dict[str, Any]:
    """Of the section zero_optimization: all that lies in parts on a disk is read for one use, and dropped behind it."""
    return {
        "sub_group_size": PART_ELEMENTS,
        # A matrix that waits whole for its next use would keep its buffer.
        "stage3_max_reuse_distance": 0,
        "offload_param": {
            "device": "nvme",
            "nvme_path": str(swap_folder(config)),
            # DeepSpeed would leave the first 10**9 elements in host memory.
            "max_in_cpu": 0,
            "buffer_count": BUFFERS,
            "buffer_size": -(-_largest_parameter(config) // world),
        },
    }


def _largest_parameter(config: RunConfig) -> int:
    model = config.model
    positions = config.train.sequence_length if model.position == "learned" else 0
    return model.d_model * max(model.vocab_size or 0, positions, model.ff_width, model.d_model)
