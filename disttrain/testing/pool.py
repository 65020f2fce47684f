"""A pool of rank processes: start them, hand out jobs, and end all of them when one fails."""

from __future__ import annotations

import atexit
import itertools
import pickle
import tempfile
import time
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from disttrain.testing.process import PRELOAD, Job, RankProcess, Report

START_SECONDS = 180.0
"""How long new workers may take to import torch; on a loaded laptop the first ones take half a minute."""

GRACE_SECONDS = 0.2
"""How long the other ranks may still report errors of their own after the first one."""


class JobError(RuntimeError):
    """A job failed. `failures` maps each failed rank, first failure first, to the text that says what happened there.

    The text is a traceback, or the exit status of a process that died, or a Python stack after the timeout.
    """

    def __init__(self, headline: str, failures: dict[int, str]) -> None:
        self.failures = failures
        reports = (f"----- rank {rank} -----\n{text.rstrip()}" for rank, text in failures.items())
        super().__init__("\n".join((headline, *reports)))


class RankPool(AbstractContextManager["RankPool"]):
    """Rank processes that keep their imports between jobs; use it as a context manager or call `close`.

    Workers start when a job first needs them. On the CPU they are forked from a server that has imported torch, and use
    gloo over the loopback interface; with `device="cuda"` they are spawned, rank r uses GPU r, and nccl. A job starts
    with a new process's environment and default dtype, and torch seeded with its rank; other global state of earlier
    jobs, such as imported modules, stays.
    """

    def __init__(self, max_world: int = 8, device: Literal["cpu", "cuda"] = "cpu") -> None:
        self.max_world = max_world
        self.device = device
        self._context = ForkServerContext() if device == "cpu" else SpawnContext()
        self._context.set_forkserver_preload(list(PRELOAD))
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._workers: list[RankProcess] = []
        self._job_numbers = itertools.count()
        self._closed = False
        # Registered after multiprocessing's own exit handler, so it runs before that one waits for the workers.
        atexit.register(self.close)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, function: str, /, world: int, timeout_seconds: float = 60.0, **kwargs: Any) -> list[Any]:
        """Call `function(rank, world, **kwargs)` on `world` ranks in a new process group; return results by rank.

        `function` is "package.module:function", importable in a worker. `timeout_seconds` bounds the job and each of
        its collectives, not the start of workers. Arguments and results must be picklable, and are copied.

        Raises JobError after the first rank that fails, or at the timeout; all workers end, and the next job starts new
        ones. Raises ValueError for a world or a name that cannot be run, RuntimeError on a closed pool.
        """
        if self._closed:
            raise RuntimeError("the pool is closed: make a new RankPool")
        if not 1 <= world <= self.max_world:
            raise ValueError(f"world = {world} is not between 1 and the pool's max_world = {self.max_world}")
        if not all(function.partition(":")):
            raise ValueError(f'{function!r} does not name a job: write "package.module:function"')
        store = Path(self._folder.name, f"store-{next(self._job_numbers)}")
        job = Job(function, world, timeout_seconds, str(store), pickle.dumps(kwargs))
        try:
            workers = self._ready_workers(world)
            for worker in workers:
                worker.send(job)
            results = _collect(function, workers, timeout_seconds)
            # Only now, since a rank that leaves its process group early could break the last collective of another.
            for worker in workers:
                worker.send(None)
        except BaseException:
            self._kill_workers()
            raise
        return results

    def close(self) -> None:
        """End the workers and remove the temporary folder; a second call does nothing."""
        self._closed = True
        atexit.unregister(self.close)
        self._kill_workers()
        self._folder.cleanup()

    def _ready_workers(self, world: int) -> list[RankProcess]:
        if not all(worker.alive for worker in self._workers):
            self._kill_workers()
        present = len(self._workers)
        for rank in range(present, world):
            self._workers.append(RankProcess(self._context, rank, self.device, Path(self._folder.name)))
        _collect("the start of the workers", self._workers[present:world], START_SECONDS)
        return self._workers[:world]

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.close()
        self._workers.clear()


def _collect(what: str, workers: list[RankProcess], timeout_seconds: float) -> list[Any]:
    """The results in the order of `workers`; raises JobError soon after the first failure, or at the timeout."""
    pending = {worker.rank: worker for worker in workers}
    reports: dict[int, Report] = {}
    deadline = time.monotonic() + timeout_seconds
    while pending:
        sources = [source for worker in pending.values() for source in worker.sources]
        ready = wait(sources, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for worker in [worker for worker in pending.values() if not set(ready).isdisjoint(worker.sources)]:
            reports[worker.rank] = worker.receive()
            del pending[worker.rank]
            if reports[worker.rank].error:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    failed = sorted((rank for rank in reports if reports[rank].error), key=lambda rank: reports[rank].seconds)
    if failed:
        headline = f"{what} failed on {_ranks(failed)} of {len(workers)}; all ranks were ended"
        raise JobError(headline, {rank: reports[rank].error for rank in failed})
    if pending:
        headline = f"{what} gave no result within {timeout_seconds:g} s on {_ranks(pending)} of {len(workers)}"
        raise JobError(headline, _stacks(pending.values()))
    return [reports[worker.rank].result for worker in workers]


def _stacks(workers: Collection[RankProcess]) -> dict[int, str]:
    """The Python stacks of workers that are past the timeout: they write them without being asked, a moment later."""
    for _ in range(40):
        time.sleep(0.05)
        if all(worker.wrote_stack for worker in workers):
            break
    time.sleep(0.05)
    return {worker.rank: worker.stack() for worker in workers}


def _ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}"
