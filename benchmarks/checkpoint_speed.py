"""What a checkpoint costs beside writing its bytes: the part of `benchmarks/faults.py checkpoints` that takes time.

One process saves and loads float32 tensors in turns, each way once a round; every number is a ratio within one round.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from disttrain.checkpoint.dcp_io import quiet_dcp
from disttrain.checkpoint.manager import CheckpointManager
from disttrain.testing.checkpoints import about, manager

TENSORS = 25
BLOCK_BYTES = 4 * 2**20
KEEP_ALL = 10**6
WRITING, READING = "writing the bytes, with fsync", "reading the bytes"
State = dict[str, Tensor]


def write_bytes(state: State, path: Path, fsync: bool) -> None:
    with path.open("xb", buffering=0) as file:
        for tensor in state.values():
            data = tensor.view(torch.uint8).view(-1).numpy().data
            for start in range(0, len(data), BLOCK_BYTES):
                file.write(data[start : start + BLOCK_BYTES])
        if fsync:
            os.fsync(file.fileno())


def read_bytes(path: Path) -> None:
    block = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


class Round:
    """Every way of saving and loading, timed once, each in a folder of its own."""

    def __init__(self, folder: Path, state: State, managers: dict[str, CheckpointManager], step: int) -> None:
        self.folder, self.state, self.managers, self.step = folder, state, managers, step
        self.into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        self.seconds: dict[str, float] = {}
        self.cores: dict[str, float] = {}

    def take(self) -> Round:
        saves: list[tuple[str, Callable[[], object]]] = [
            ("writing the bytes", lambda: write_bytes(self.state, self.folder / "plain", fsync=False)),
            (WRITING, lambda: write_bytes(self.state, self.folder / "synced", fsync=True)),
            ("save", lambda: self.save("ours")),
            ("save, without checksum", self.save_without_checksum),
            ("torch.save", lambda: torch.save(self.state, self.folder / "torch.pt")),
            ("dcp.save", lambda: dcp.save(dict(self.state), checkpoint_id=self.folder / "dcp", no_dist=True)),
            ("save beside the training", self.save_beside),
        ]
        turn = self.step % len(saves)
        for name, act in saves[turn:] + saves[:turn]:
            self.time(name, act)
        for name, act in (
            (READING, lambda: read_bytes(self.folder / "synced")),
            ("verify and load", self.load),
            ("torch.load", lambda: torch.load(self.folder / "torch.pt")),
            ("dcp.load", lambda: dcp.load(dict(self.into), checkpoint_id=self.folder / "dcp", no_dist=True)),
        ):
            self.forget_files()
            self.time(name, act)
        return self

    def time(self, name: str, act: Callable[[], object]) -> None:
        os.sync()
        began, worked = time.perf_counter(), time.process_time()
        act()
        self.seconds[name], self.cores[name] = time.perf_counter() - began, time.process_time() - worked

    def forget_files(self) -> None:
        """Out of the page cache with everything: a save of ours has left it already, others have not."""
        os.sync()
        for path in self.folder.parent.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def save(self, name: str) -> None:
        self.managers[name].save(self.state, **about(self.step))

    def save_without_checksum(self) -> None:
        with patch.object(zlib, "crc32", lambda data, value=0: 0):
            self.save("unchecked")

    def save_beside(self) -> None:
        began = time.perf_counter()
        self.managers["beside"].start(self.state, **about(self.step))
        self.seconds["save beside the training, the stall"] = time.perf_counter() - began
        self.managers["beside"].finish()

    def load(self) -> None:
        checkpoints = self.managers["ours"]
        found = checkpoints.latest()
        assert found is not None
        checkpoints.load(self.into, found)


def measure(megabytes: int, rounds: int) -> dict[str, Any]:
    """Ratios to writing with fsync, and to reading: median, lowest and highest; the first round is left out."""
    state = {f"model.{index}": torch.randn(megabytes * 250_000 // TENSORS) for index in range(TENSORS)}
    taken: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="speed-") as name:
        # As in a run, where one manager lives from save to save.
        managers = {
            way: manager(Path(name, way), KEEP_ALL, asynchronous=way == "beside")
            for way in ("ours", "unchecked", "beside")
        }
        for step in range(rounds + 1):
            folder = Path(name, str(step))
            folder.mkdir()
            with quiet_dcp():
                taken.append(Round(folder, state, managers, step).take())
            for made in Path(name).iterdir():
                shutil.rmtree(made)
        kind = subprocess.run(["stat", "-f", "-c", "%T", name], capture_output=True, text=True).stdout.strip()
    kept = [timed.seconds for timed in taken[1:]]
    cores = [timed.cores for timed in taken[1:]]
    return {
        "megabytes": megabytes,
        "rounds": rounds,
        "file_system": kind,
        "to_writing": {way: spread([s[way] / s[WRITING] for s in kept]) for way in kept[0]},
        "to_reading": {way: spread([s[way] / s[READING] for s in kept]) for way in kept[0] if "load" in way},
        "checksum": {"time": spread(checksum_cost(kept)), "core time": spread(checksum_cost(cores))},
    }


def checksum_cost(rounds: list[dict[str, float]]) -> list[float]:
    return [seconds["save"] / seconds["save, without checksum"] for seconds in rounds]


def spread(ratios: list[float]) -> dict[str, float]:
    values = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {name: round(value, 3) for name, value in values.items()}


def speed_lines(speed: dict[str, Any]) -> list[str]:
    """The part of the report that is about time, as markdown."""
    where = f"{speed['megabytes']} MB of float32 in {TENSORS} tensors, one process, {speed['file_system']}"
    lines = [
        f"{where}: medians of {speed['rounds']} rounds (lowest to highest), as ratios to {WRITING}. Nothing that "
        "is read lies in the page cache.",
        "",
        f"| way | to {WRITING} | to {READING} |",
        "|---|---|---|",
    ]
    for way, ratio in speed["to_writing"].items():
        reading = speed["to_reading"].get(way)
        lines.append(f"| {way} | {_cell(ratio)} | {_cell(reading) if reading else ''} |")
    costs = " and ".join(f"{_percent(ratio)} to its {what}" for what, ratio in speed["checksum"].items())
    return [*lines, "", f"The checksum adds to a save {costs} (without it: zlib.crc32 returns 0)."]


def _percent(ratio: dict[str, float]) -> str:
    median, lowest, highest = (f"{(ratio[name] - 1) * 100:+.0f}" for name in ("median", "lowest", "highest"))
    return f"{median} % ({lowest} to {highest})"


def _cell(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
