"""TensorBoard event files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from disttrain.monitor.record import Histogram, Record, histograms, scalars
from disttrain.monitor.sinks.base import Ending, Event


class TensorBoardSink:
    """Writes into `directory`; what was recorded beyond `resumed_step` is hidden by a purge mark."""

    def __init__(self, directory: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = lambda step: SummaryWriter(str(directory), purge_step=step + 1, flush_secs=10)
        self._writer = self._open(resumed_step)

    def log(self, record: Record) -> None:
        values, step = scalars(record), int(scalars(record)["step"])
        for key, value in values.items():
            if key not in ("step", "unix_seconds"):
                self._writer.add_scalar(key, value, step, walltime=values.get("unix_seconds"))
        for key, histogram in histograms(record).items():
            if histogram.counts:
                self._add(key, histogram, step)

    def event(self, event: Event) -> None:
        if event.kind == "rollback":
            self._writer.close()
            self._writer = self._open(event.step)
        self._writer.add_text(f"events/{event.kind}", event.text, event.step, walltime=event.unix_seconds)

    def sample(self, step: int, text: str) -> None:
        # Indented: TensorBoard renders text as Markdown.
        self._writer.add_text("sample", "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self, ending: Ending) -> None:
        self._writer.close()

    def _add(self, key: str, histogram: Histogram, step: int) -> None:
        middles = [math.sqrt(low * high) for low, high in zip(histogram.edges, histogram.edges[1:], strict=False)]
        counts = np.array(histogram.counts)
        self._writer.add_histogram_raw(
            key,
            min=histogram.edges[0],
            max=histogram.edges[-1],
            num=int(counts.sum()),
            sum=float(counts @ middles),
            sum_squares=float(counts @ np.square(middles)),
            bucket_limits=list(histogram.edges[1:]),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
