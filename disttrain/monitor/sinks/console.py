"""The terminal: a live progress bar, or plain lines where nobody watches."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class ConsoleSink:
    """Shows loss, learning rate, tokens per second and the time left; validation results stay on the screen."""

    def __init__(self, total_steps: int, first_step: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.total_steps = total_steps
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

    def log(self, record: dict[str, float]) -> None:
        summary = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tok/s"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], description=summary)
        else:
            left = f"{record['seconds_left']:.0f} s left"
            self.say(f"step {record['step']:.0f}/{self.total_steps}  {summary}  {left}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
