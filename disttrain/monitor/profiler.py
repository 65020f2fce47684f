"""torch's profiler over a few steps of every rank, and what it says in brief."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from disttrain.distributed.env import Ranks
from disttrain.monitor.trace import summarise_trace

SNAPSHOT_ENTRIES = 100_000
"""Allocations that CUDA's memory history holds."""


class StepProfiler:
    """Writes `rank-R.json` (for Perfetto) of the first to the last of `steps` into `folder`, on CUDA a memory snapshot
    `memory-R.pickle` (for torch's memory_viz page; nothing here reads it), and `summary.json` of the first rank."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, ranks: Ranks, device: torch.device) -> None:
        self.steps, self.folder, self.ranks = steps, folder, ranks
        self.on_cuda = device.type == "cuda"
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        if self.steps is None or not self.steps[0] <= step <= self.steps[1] or self._profile is not None:
            return
        if self.on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
        self._first, self._profile = step, profile(activities=activities)
        with _quiet():
            self._profile.__enter__()

    def due(self, step: int, last: int) -> bool:
        """Whether `after` has something to do: the last step to profile, or the run's `last`, is over."""
        return self._profile is not None and self.steps is not None and step >= min(self.steps[1], last)

    def after(self, step: int) -> list[str]:
        """Write what was profiled; lines to tell, on the first rank."""
        if self._profile is None:
            return []
        if self.on_cuda:
            torch.cuda.synchronize()
        profiled, self._profile = self._profile, None
        with _quiet():
            profiled.__exit__(None, None, None)
        try:
            summary = self._write(profiled, step)
        except (OSError, ValueError, RuntimeError) as error:
            return [f"profile not written into {self.folder}: {error}"]
        finally:
            if self.on_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
        return _describe(summary, self.folder) if self.ranks.is_first else []

    def _write(self, profiled: profile, step: int) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"rank-{self.ranks.rank}.json"
        profiled.export_chrome_trace(str(trace))
        if self.on_cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{self.ranks.rank}.pickle"))
        if not self.ranks.is_first:
            return {}
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        about = {"steps": [self._first, step], "world": self.ranks.world}
        summary = about | summarise_trace(events, step - self._first + 1)
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return summary


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that torch's tracer prints on stderr at any log level, into the middle of a progress bar."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _describe(summary: dict[str, Any], folder: Path) -> list[str]:
    first, last = summary["steps"]
    lines = [
        f"profile of steps {first} to {last}, {folder}: {summary['step_seconds']:.3f} s a step, communication "
        f"{summary['communication_seconds']:.3f} s, of which {summary['exposed_communication_seconds']:.3f} s with no "
        "computing meanwhile"
    ]
    for row in summary["operators"]:
        lines.append(f"  {row['self_seconds']:9.4f} s {row['share']:6.1%} {row['calls']:7d} calls  {row['name']}")
    return lines
