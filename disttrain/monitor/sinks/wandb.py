"""Weights & Biases, through its own client: every row of metrics.jsonl once, over kills and resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.config.monitor import WandbConfig
from disttrain.monitor.record import Histogram, Record, Value
from disttrain.monitor.sinks.base import Ending, Event
from disttrain.monitor.sinks.wandb_file import last_recorded_step

ALERTS = {"stop": "WARN", "rollback": "WARN", "failed": "ERROR"}
FLUSH_SECONDS = 1.0
"""How long W&B's client may keep rows in memory; its own default is fifteen."""


@dataclass(frozen=True)
class WandbRun:
    """What a run tells W&B about itself. `earlier` reads the rows of metrics.jsonl after a step, to the resumed one."""

    id: str
    name: str
    directory: Path
    settings: Mapping[str, Any]
    earlier: Callable[[int], Iterable[Record]]


class WandbSink:
    """Rows of one step are put together and sent when the next step comes: W&B takes each step once, in order.

    A resumed run goes on where W&B's record ends, not where the run was resumed: steps that are computed again are not
    sent again, and steps that died with the client are sent from metrics.jsonl.
    """

    def __init__(self, config: WandbConfig, run: WandbRun, say: Callable[[str], None]) -> None:
        self.config, self.name = config, run.name
        self._run, self._sent = _start(config, run, say)
        self._pending: dict[str, Any] = {}
        self._samples: list[list[Any]] = []
        for record in run.earlier(self._sent):
            self.log(record)

    def log(self, record: Record) -> None:
        step = int(_number(record["step"]))
        if step <= self._sent:
            return
        if self._pending and self._pending["step"] != step:
            self._send()
        self._pending |= {key: _converted(value) for key, value in record.items()}

    def event(self, event: Event) -> None:
        if event.kind == "rollback" and self._pending and self._pending["step"] > event.step:
            self._pending = {}  # of a step that does not stand
        if self.config.alerts and event.kind in ALERTS:
            self._run.alert(f"{self.name}: {event.kind} at step {event.step}", event.text, level=ALERTS[event.kind])

    def sample(self, step: int, text: str) -> None:
        self._samples.append([step, text])

    def close(self, ending: Ending) -> None:
        try:
            self._send()
            self._send_samples()
            if ending == "preempted":
                self._run.mark_preempting()
        finally:
            self._run.finish(exit_code=int(ending == "failed"))

    def _send_samples(self) -> None:
        """To the last step, which the client holds open, but by themselves: a table is uploaded, which may fail."""
        import wandb

        if self._samples and self._samples[-1][0] >= self._sent:
            self._run.log({"samples": wandb.Table(["step", "text"], data=self._samples)}, step=self._sent)

    def _send(self) -> None:
        if self._pending:
            row, self._pending = self._pending, {}
            self._sent = max(self._sent, row["step"])
            self._run.log(row, step=row["step"])


def _start(config: WandbConfig, run: WandbRun, say: Callable[[str], None]) -> tuple[Any, int]:
    """W&B's run and the last step that it has."""
    import wandb

    if config.mode == "online":
        try:
            started = wandb.init(**_arguments(config, run, "online"), resume="allow")
            return started, started.starting_step - 1 if started.resumed else 0
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"W&B: {line}; recording offline in {run.directory / 'wandb'}, `wandb sync` sends it later")
            # Otherwise the client holds on to the run that it could not start.
            wandb.teardown()
    sent = last_recorded_step(run.directory, run.id)
    return wandb.init(**_arguments(config, run, "offline")), sent


def _arguments(config: WandbConfig, run: WandbRun, mode: str) -> dict[str, Any]:
    import wandb

    wishes = {
        "silent": True,
        # A live progress bar is no log; what is said in words stands in events.jsonl.
        "console": "off",
        "init_timeout": config.start_seconds,
        "finish_timeout": config.finish_seconds,
        "x_transaction_log_flush_interval": FLUSH_SECONDS,
    }
    known = {name: wish for name, wish in wishes.items() if name in wandb.Settings.model_fields}
    return {
        "mode": mode,
        "id": run.id,
        "project": config.project,
        "entity": config.entity,
        "name": config.name or run.name,
        "group": config.group,
        "job_type": config.job_type,
        "tags": list(config.tags),
        "notes": config.notes,
        "config": dict(run.settings),
        "dir": str(run.directory),
        "settings": known,
    }


def _converted(value: Value) -> Any:
    if not isinstance(value, Histogram):
        return value
    import wandb

    return wandb.Histogram(np_histogram=(np.array(value.counts), np.array(value.edges))) if value.counts else None


def _number(value: Value) -> float:
    if isinstance(value, Histogram):
        raise TypeError("a step is a number")
    return value
