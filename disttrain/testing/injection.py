"""Faults inside of ranks of a real run, and a record of what they read; `Command(prepare=...)` puts them in.

What to do is said by the environment: `FAULTS` is a folder. A file `slow` in it holds seconds to sleep in each step; a
file `hang-R` makes rank R loop for ever in its next step, `disorder-R` makes it call a collective that no other rank
calls, `flip-R` turns over one bit of a weight of rank R, `absent-R` keeps rank R from the meeting of the ranks,
`unsaved-R` from its next save; each is taken away by that. `samples-PID` is what a process has read.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from disttrain.data.loader import BatchLoader, Microbatch
from disttrain.distributed import process_group
from disttrain.distributed.env import Ranks
from disttrain.engines import NativeEngine
from disttrain.optim.sharding import local
from disttrain.testing.bad_numbers import flip_first
from disttrain.train.saving import RunCheckpoints

_microbatches = BatchLoader.microbatches
_begin_step = NativeEngine.begin_step
_meet = process_group.meet
_save = RunCheckpoints.save


def install() -> None:
    """In this process and in its forks."""
    setattr(BatchLoader, "microbatches", _with_faults)  # noqa: B010 (mypy would not have a method replaced)
    setattr(NativeEngine, "begin_step", _with_flips)  # noqa: B010
    setattr(process_group, "meet", _with_absence)  # noqa: B010
    setattr(RunCheckpoints, "save", _with_delay)  # noqa: B010


def _with_delay(checkpoints: RunCheckpoints, *arguments: Any, **named: Any) -> None:
    if taken(Path(os.environ["FAULTS"]) / f"unsaved-{dist.get_rank()}"):
        while True:
            time.sleep(1.0)
    _save(checkpoints, *arguments, **named)


def _with_absence(ranks: Ranks, timeout_seconds: float) -> dist.Store:
    if taken(Path(os.environ["FAULTS"]) / f"absent-{ranks.rank}"):
        while True:
            time.sleep(1.0)
    return _meet(ranks, timeout_seconds)


def _with_faults(loader: BatchLoader, position: int, samples: int) -> list[Microbatch]:
    folder, rank, world = Path(os.environ["FAULTS"]), dist.get_rank(), dist.get_world_size()
    own = samples // world
    ids = [loader._order.locate(position + rank * own + index) for index in range(own)]
    with (folder / f"samples-{os.getpid()}").open("a") as file:
        file.write(json.dumps([time.monotonic(), position, rank, world, ids]) + "\n")
    if (slow := folder / "slow").exists():
        time.sleep(float(slow.read_text()))
    if taken(folder / f"hang-{rank}"):
        while True:
            pass
    if taken(folder / f"disorder-{rank}"):
        dist.broadcast(torch.zeros(1), src=rank)
    return _microbatches(loader, position, samples)


def _with_flips(engine: NativeEngine, *arguments: Any, **named: Any) -> list[int]:
    if taken(Path(os.environ["FAULTS"]) / f"flip-{dist.get_rank()}"):
        flip_first(local(next(engine.module.parameters())))
    return _begin_step(engine, *arguments, **named)


def taken(flag: Path) -> bool:
    """Whether a flag is there; it is no longer afterwards."""
    if not flag.exists():
        return False
    flag.unlink()
    return True


def samples_read(folder: Path, until: int) -> list[tuple[int, int]]:
    """The samples of the run as it stands at its end, up to position `until`, sorted: of each batch the last read.

    ValueError where a rank's part of one is missing.
    """
    reads: dict[int, list[tuple[float, int, int, list[list[int]]]]] = {}
    for path in folder.glob("samples-*"):
        for line in path.read_text().splitlines():
            when, position, rank, world, ids = json.loads(line)
            if position < until:
                reads.setdefault(position, []).append((when, rank, world, ids))
    found = []
    for position, read in reads.items():
        world = max(read)[2]
        last = sorted(read)[-world:]
        if sorted(rank for _, rank, _, _ in last) != list(range(world)):
            raise ValueError(f"of the batch at {position} the parts of all {world} ranks were not read together")
        found += [(shard, window) for _, _, _, ids in last for shard, window in ids]
    return sorted(found)
