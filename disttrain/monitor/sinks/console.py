"""The terminal: a live progress bar, or plain lines where nobody watches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from disttrain.monitor.record import Record, scalars

SPARKS = "▁▂▃▄▅▆▇█"
WIDTH = 16
"""Rows that the sparkline shows."""


class ConsoleSink:
    """Shows loss, learning rate, tokens per second and the time left; what is said stays on the screen."""

    def __init__(self, total_steps: int, first_step: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.total_steps = total_steps
        self._losses: deque[float] = deque(maxlen=WIDTH)
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("first step", total=total_steps, completed=first_step)
            self._progress.start()

    def total(self, steps: int) -> None:
        self.total_steps = steps
        if self._progress is not None:
            self._progress.update(self._task, total=steps)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        self.console.print(text, markup=False)

    def log(self, record: Record) -> None:
        values = scalars(record)
        self._losses.append(values["loss"])
        rest = f"lr {values['lr']:.2e}  norm {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tok/s"
        if "mfu" in values:
            rest += f"  MFU {values['mfu']:.1%}"
        if self._progress is not None:
            shown = f"loss [green]{sparkline(self._losses)}[/green] {values['loss']:.4f}  {rest}"
            self._progress.update(self._task, completed=values["step"], description=shown)
        else:
            left = f"{values['seconds_left']:.0f} s left"
            self.say(f"step {values['step']:.0f}/{self.total_steps}  loss {values['loss']:.4f}  {rest}  {left}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, from the least to the greatest of them; a gap for what is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)
