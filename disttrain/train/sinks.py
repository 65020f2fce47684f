"""The sinks that a config asks for besides console and metrics.jsonl, each in a thread of its own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from disttrain.checkpoint.manifest import Manifest
from disttrain.config.monitor import MonitorConfig
from disttrain.monitor import BackgroundSink, Ending, Event, Record, Sink, read_rows
from disttrain.train.extras import prometheus_token
from disttrain.train.folder import RunFolder, disk_errors
from disttrain.train.preflight import PreparedRun

CLOSE_SECONDS = 5.0
"""What a sink may take for its end; a run that failed or was stopped waits no longer for any."""


class RunSinks:
    """All of them as one. They live on the first rank."""

    def __init__(self, sinks: Mapping[str, tuple[BackgroundSink, float]]) -> None:
        self._sinks = dict(sinks)

    def log(self, record: Record) -> None:
        for sink, _ in self._sinks.values():
            sink.log(record)

    def event(self, event: Event) -> None:
        for sink, _ in self._sinks.values():
            sink.event(event)

    def sample(self, step: int, text: str) -> None:
        for sink, _ in self._sinks.values():
            sink.sample(step, text)

    def close(self, ending: Ending) -> None:
        """All at once, and by one deadline: whoever asked for a stop, or waits for an error, waits for no sink."""
        for sink, _ in self._sinks.values():
            sink.finish(ending)
        began = time.monotonic()
        for sink, patience in self._sinks.values():
            seconds = patience if ending == "completed" else CLOSE_SECONDS
            sink.join(max(0.0, began + seconds - time.monotonic()))


def build_sinks(
    run: PreparedRun,
    resumed: Manifest | None,
    wandb_id: str | None,
    environment: Mapping[str, Any],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> RunSinks:
    """They begin with the rows after the step of the `resumed` checkpoint; `say` and `warn` print."""
    config, folder, step = run.config.monitor, run.folder, resumed.step if resumed else 0
    builders: dict[str, tuple[Callable[[], Sink], float]] = {}
    if wandb_id is not None:
        settings = {**run.config.model_dump(mode="json"), "environment": dict(environment)}
        build = partial(_wandb, config, folder, _name(run), wandb_id, settings, step, warn)
        builders["W&B"] = (build, config.wandb.finish_seconds + CLOSE_SECONDS)
    if config.tensorboard.enabled:
        builders["TensorBoard"] = (partial(_tensorboard, folder, step), CLOSE_SECONDS)
    if config.prometheus.port is not None:
        builders["Prometheus"] = (partial(_prometheus, config, _name(run), say), CLOSE_SECONDS)
    return RunSinks({name: (BackgroundSink(name, build, warn), wait) for name, (build, wait) in builders.items()})


def wandb_run_id(run: PreparedRun, resumed: Manifest | None) -> str | None:
    """The id under which W&B knows this run: the checkpoint's, or the folder's where a run died before its first one.

    None where W&B is off. A run that starts anew (`run.resume = "never"`) is a new one there too.
    """
    if run.config.monitor.wandb.mode == "disabled":
        return None
    if resumed is not None and (kept := resumed.extra.get("wandb", {}).get("id")):
        return str(kept)
    file = run.folder.path / "wandb" / "run_id"
    if run.config.run.resume != "never":
        with suppress(OSError):
            if kept := file.read_text(encoding="ascii").strip():
                return kept
    new = secrets.token_hex(4)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(new + "\n", encoding="ascii")
    return new


def _name(run: PreparedRun) -> str:
    return run.folder.path.name if run.config.run.dir else run.config.run.name


def _wandb(
    config: MonitorConfig,
    folder: RunFolder,
    name: str,
    run_id: str,
    settings: Mapping[str, Any],
    step: int,
    warn: Callable[[str], None],
) -> Sink:
    from disttrain.monitor.sinks.wandb import WandbRun, WandbSink

    def earlier(sent: int) -> Iterator[Record]:
        return read_rows(folder.metrics, sent, step)

    return WandbSink(config.wandb, WandbRun(run_id, name, folder.path, settings, earlier), warn)


def _tensorboard(folder: RunFolder, step: int) -> Sink:
    from disttrain.monitor.sinks.tensorboard import TensorBoardSink

    return TensorBoardSink(folder.path / "tensorboard", step)


def _prometheus(config: MonitorConfig, name: str, say: Callable[[str], None]) -> Sink:
    from disttrain.monitor.sinks.prometheus import PrometheusSink

    section = config.prometheus
    return PrometheusSink(name, section.address, section.port or 0, prometheus_token(section), say)
