"""One rank's process as its parent sees it, and the two messages that they exchange.

This module does not import torch, so that a program that only owns a pool starts quickly.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

PRELOAD = ("disttrain.testing.worker", "disttrain.cli.app", "disttrain.train.run", "disttrain.launching.elastic")
"""What the fork server imports, of which there is one in a program."""


class Job(NamedTuple):
    """What a rank needs to run one function; the keyword arguments are pickled, so tensors travel by value."""

    function: str
    world: int
    timeout_seconds: float
    store: str
    kwargs: bytes


class Report(NamedTuple):
    """A rank's answer: its result, which travels pickled, or its error as text and when it failed (monotonic clock)."""

    result: Any = None
    error: str = ""
    seconds: float = 0.0


class RankProcess:
    """A started process that serves jobs as one rank; its first report says that it is ready."""

    def __init__(self, context: ForkServerContext | SpawnContext, rank: int, device: str, folder: Path) -> None:
        self.rank = rank
        self._connection, far_end = context.Pipe()
        self._stack_file = folder / f"stack-{rank}.txt"
        # Not daemonic: such a process may not have children, and a job may use a data loader's workers.
        self._process = context.Process(
            target=_serve, args=(rank, device, self._stack_file, far_end), name=f"rank {rank}"
        )
        with start_conditions():
            self._process.start()
        far_end.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def sources(self) -> tuple[Connection, int]:
        """What `multiprocessing.connection.wait` finds ready on a report or at the end of the process."""
        return self._connection, self._process.sentinel

    def send(self, message: Job | None) -> None:
        """Send a job, or None to release the rank from it; a process that died is found by who waits for its report."""
        with suppress(OSError):
            self._connection.send(message)

    def receive(self) -> Report:
        """The report that is ready, or one that says how the process died, dated before other failures: their cause."""
        try:
            # After a death there may be nothing to read, and yet a child of the process may hold the pipe open.
            report = self._connection.recv() if self._connection.poll() else None
        except (EOFError, OSError):
            report = None
        if report is None:
            self._process.join(1.0)
            return Report(error=f"its process {_exit_status(self._process.exitcode)} before it reported a result")
        try:
            return report if report.error else Report(pickle.loads(report.result))
        except Exception:
            return Report(error=f"its result cannot be unpickled by the caller:\n{traceback.format_exc()}")

    @property
    def wrote_stack(self) -> bool:
        return self._stack_file.exists() and self._stack_file.stat().st_size > 0

    def stack(self) -> str:
        """The stacks that the process wrote at the timeout, without the thread that only waits for the parent."""
        text = self._stack_file.read_text() if self.wrote_stack else ""
        threads = [thread for thread in text.split("\n\n") if "_end_with_parent" not in thread]
        return "\n\n".join(threads) or "(it wrote no Python stack)"

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Wait for the end of a killed process and free its handles."""
        self._process.join()
        self._process.close()
        self._connection.close()


def _serve(rank: int, device: str, stack_file: Path, connection: Connection) -> None:
    from disttrain.testing.worker import serve

    serve(rank, device, stack_file, connection)


@contextmanager
def start_conditions() -> Iterator[None]:
    """One thread per rank, this package importable, and an empty `__main__`.

    The fork server of Python 3.11 does not get the parent's `sys.path`. A worker would run the caller's script again,
    which costs time and, in a script without a guard, starts another pool; jobs are named by module instead.
    """
    main = sys.modules["__main__"]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    before = {name: os.environ[name] for name in changes if name in os.environ}
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ.update(changes)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name in changes:
            del os.environ[name]
        os.environ.update(before)


def _exit_status(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
