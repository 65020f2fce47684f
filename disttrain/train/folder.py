"""The run folder: its files, its state, and the lock that keeps a second run out. No torch here."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from disttrain.checkpoint.manifest import committed_steps
from disttrain.config import RunConfig
from disttrain.errors import StorageError, UserError

_TAIL_BYTES = 1 << 18
RELEASE_SECONDS = 3.0
State = Literal["running", "completed", "preempted", "failed"]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk that refuses into one line."""
    try:
        yield
    except OSError as error:
        problem = f"{error.filename or path}: {error.strerror or error}; free space, check permissions, set run.dir"
        raise StorageError(problem) from error


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def stop_file(self) -> Path:
        """Whoever makes it asks the run to stop."""
        return self.path / "STOP"

    @property
    def hang(self) -> Path:
        return self.path / "hang"

    @property
    def traces(self) -> Path:
        return self.path / "trace"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    def read_status(self) -> dict[str, Any]:
        """The last known state and step; empty before the first run."""
        try:
            status = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        known = isinstance(status, dict) and isinstance(status.get("step"), int)
        return status if known else {}

    def write_status(self, state: State, step: int, **about: Any) -> None:
        """What was said of the run besides (`about`) stays until it is said anew."""
        self._write_json("status.json", self.read_status() | {"state": state, "step": step} | about)

    def write_failed(self) -> None:
        """Failed, at the step that a restart would begin with."""
        steps = committed_steps(self.checkpoints)
        self.write_status("failed", int(steps[0].name.removeprefix("step-")) if steps else 0)

    def last_step(self) -> int:
        """Of the last whole row of metrics.jsonl; 0 where there is none."""
        with suppress(OSError), self.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            for line in reversed(file.read().splitlines()):
                with suppress(ValueError, KeyError, TypeError):
                    return int(json.loads(line)["step"])
        return 0

    def write_config(self, config: RunConfig) -> None:
        self._write_json("config.json", config.model_dump(mode="json"))

    def write_ds_config(self, translated: dict[str, Any]) -> None:
        """What DeepSpeed was given."""
        self._write_json("ds_config.json", translated)

    def write_ownership(self, rows: list[dict[str, Any]], exchanges: list[list[str]]) -> None:
        self._write_json("ownership.json", {"parameters": rows, "matrix_exchanges": exchanges})

    def write_environment(self, environment: dict[str, Any]) -> None:
        self._write_json("environment.json", environment)

    def add_event(self, kind: str, step: int, text: str) -> dict[str, Any]:
        """A line of events.jsonl, which no resume shortens. A disk that refuses it costs the line, not the run."""
        event = {"unix_seconds": time.time(), "step": step, "kind": kind, "text": text}
        with suppress(OSError), self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        return event

    def add_sample(self, step: int, text: str) -> None:
        with (self.path / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n")

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Make the folder and hold it; UserError when another process does. Forked ranks hold it with us.

        A process that has just died may hold it a moment longer, until the last of its threads is gone.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be the run folder: {error.strerror}; set run.dir") from error
        with lock:
            if not _locked(lock, RELEASE_SECONDS):
                lock.seek(0)
                owner = lock.read().strip() or "another process"
                raise UserError(f"{self.path}: {owner} is running here; wait for it or set another run.name")
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)  # somebody may have removed it underneath a run
        whole = self.path / f"{name}.tmp"
        whole.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        whole.replace(self.path / name)


def _locked(file: TextIO, seconds: float) -> bool:
    """Whether the file could be locked in that time."""
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
