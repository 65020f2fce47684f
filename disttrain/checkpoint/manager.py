"""Saving: copy, write beside the training, commit, delete. One save at a time.

All functions are collective over the default process group; one process needs no group.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from disttrain import __version__
from disttrain.checkpoint.agreement import all_gather_json, on_rank_zero, rank_and_world
from disttrain.checkpoint.manifest import FileEntry, Manifest
from disttrain.checkpoint.reading import CheckpointInfo, CheckpointReader
from disttrain.checkpoint.retention import Retention
from disttrain.checkpoint.staging import Staged, Staging
from disttrain.checkpoint.storage import Storage, step_name
from disttrain.errors import StorageError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """How a save ended: committed at `place`, or not, and then `problems` says why and nothing older was touched."""

    step: int
    place: str
    bytes: int
    stall_seconds: float
    """For how long the slowest rank could do nothing else."""
    write_seconds: float
    """What the slowest rank's writing took."""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What went wrong besides, such as an old checkpoint that cannot be deleted."""


@dataclass
class _Save:
    """The save under way, on this rank: its thread's `work` is first the file, then, on rank 0, the commit."""

    name: str
    attempt: str
    about: dict[str, Any]
    tensors: dict[str, Any]
    work: Future[Any]
    stall_seconds: float
    write_seconds: float = 0.0
    bytes: int = 0
    committing: bool = False


class CheckpointManager(CheckpointReader):
    """The checkpoints of one run in `storage`, seen by every rank. One process group at a time.

    `keep_last` is at least 1; `run_id` must stay the same when the run resumes. With `asynchronous`, `start` returns as
    soon as the state is copied to host memory, which then holds one more copy of this rank's part.
    """

    def __init__(
        self,
        storage: Storage,
        keep_last: int,
        run_id: str,
        *,
        keep_every: int | None = None,
        asynchronous: bool = False,
    ) -> None:
        super().__init__(storage)
        self.run_id = run_id
        self.retention = Retention(storage, keep_last, keep_every)
        self._asynchronous = asynchronous
        self._staging = Staging(copy=asynchronous)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None

    @property
    def pending(self) -> bool:
        """A save is under way; the same on every rank."""
        return self._save is not None

    @property
    def busy(self) -> bool:
        """This rank's thread still works on it: `advance` would wait."""
        return self._save is not None and not self._save.work.done()

    def latest(self) -> CheckpointInfo | None:
        found = super().latest()
        self.retention.protected = found.name if found else None
        return found

    def save(self, state: Mapping[str, Tensor], **about: Any) -> str:
        """`start` and `finish` in one; returns where the checkpoint lies. StorageError when it was not committed."""
        self.start(state, **about)
        saved = self.finish()
        if saved is not None and saved.problems:
            raise StorageError(saved.problems)
        return self.storage.place(step_name(about["step"]))

    def start(
        self,
        state: Mapping[str, Tensor],
        *,
        step: int,
        samples: int,
        tokens: int,
        config: dict[str, Any],
        data: dict[str, Any],
        strategy: str,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Begin to save `state` (names to plain tensors or DTensors, each tensor once).

        A step that this run committed before, and that still verifies, is not written again: nothing is pending then.
        Raises StorageError on every rank when the storage refuses the first move, and UserError for state that cannot
        be stored or a folder of another run.
        """
        if self._save is not None:
            raise RuntimeError(f"{self._save.name} is being saved: finish it before the next save starts")
        began = time.perf_counter()
        name = step_name(step)
        if self._already_committed(name):
            return
        about: dict[str, Any] = {"step": step, "samples": samples, "tokens": tokens, "world_size": rank_and_world()[1]}
        about |= {"run_id": self.run_id, "strategy": strategy, "config": config, "data": data, "extra": extra or {}}
        staged = self._staging.stage(state)
        attempt = on_rank_zero(lambda: self.storage.begin(name))
        header = {"run_id": self.run_id, "step": str(step)}
        work = self._run(lambda: self._write(attempt, staged, header))
        self._save = _Save(name, attempt, about, staged.tensors, work, time.perf_counter() - began)

    def advance(self) -> Saved | None:
        """Take the save under way one stage further: files written, then committed; its end when it has come to one.

        Waits for the slowest rank. A training loop calls it when it knows that no rank is `busy`.
        """
        save = self._save
        if save is None:
            return None
        began = time.perf_counter()
        ended = self._committed(save) if save.committing else self._written(save)
        save.stall_seconds += time.perf_counter() - began
        if ended is not None:
            self._save = None
        return ended

    def finish(self) -> Saved | None:
        """Wait for the end of the save under way; None when there is none. Storage errors are in `problems`."""
        saved = None
        while self.pending:
            saved = self.advance()
        return saved

    def _already_committed(self, name: str) -> bool:
        if not on_rank_zero(lambda: name in self.storage.committed()):
            return False
        try:
            manifest = self.verified(name)
        except UserError:
            return False  # a damaged checkpoint of this step is replaced
        if manifest.run_id != self.run_id:
            place = self.storage.place(name)
            raise UserError(f"{place}: belongs to run {manifest.run_id}, not {self.run_id}; use another run.dir")
        return True

    def _write(self, attempt: str, staged: Staged, header: dict[str, str]) -> tuple[FileEntry | None, float]:
        began = time.perf_counter()
        entry = self.storage.write(attempt, staged.file, staged.boxes, header) if staged.boxes else None
        return entry, time.perf_counter() - began

    def _written(self, save: _Save) -> Saved | None:
        """Gather what the ranks wrote; commit it in rank 0's thread, or give it up when a rank could not write."""
        report: dict[str, Any] = {"stall": save.stall_seconds, "write": 0.0, "entry": None, "problems": []}
        defect: Exception | None = None
        try:
            entry, report["write"] = save.work.result()
            report["entry"] = entry and vars(entry)
        except UserError as error:
            report["problems"] = error.problems
        except Exception as error:
            defect, report["problems"] = error, [f"{type(error).__name__}: {error}"]
        reports = all_gather_json(report)
        save.stall_seconds = max(report["stall"] for report in reports)
        save.write_seconds = max(report["write"] for report in reports)
        files = tuple(FileEntry(**report["entry"]) for report in reports if report["entry"])
        save.bytes = sum(entry.bytes for entry in files)
        problems = {rank: report["problems"] for rank, report in enumerate(reports) if report["problems"]}
        first = rank_and_world()[0] == 0
        if problems:
            if first:
                self.storage.abort(save.attempt)
            if defect is not None:
                raise defect
            return self._end(save, problems=(_one_line(problems),))
        save.committing = True
        manifest = Manifest(files=files, tensors=save.tensors, versions=_versions(), **save.about)
        save.work = self._run(lambda: self._commit(save, manifest) if first else [])
        return None

    def _commit(self, save: _Save, manifest: Manifest) -> list[str]:
        try:
            self.storage.commit(save.attempt, save.name, manifest)
        except BaseException:
            self.storage.abort(save.attempt)
            raise
        try:
            return self.retention.delete_old(save.name)
        except (UserError, OSError) as error:  # the checkpoint is there all the same
            return [f"old checkpoints stay: {error}"]

    def _committed(self, save: _Save) -> Saved:
        try:
            return self._end(save, notes=tuple(on_rank_zero(save.work.result)))
        except StorageError as error:
            return self._end(save, problems=error.problems)

    def _end(self, save: _Save, problems: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> Saved:
        place, step = self.storage.place(save.name), save.about["step"]
        return Saved(step, place, save.bytes, save.stall_seconds, save.write_seconds, problems, notes)

    def _run(self, job: Callable[[], T]) -> Future[T]:
        """In the thread beside the training; without `asynchronous` here and now."""
        if self._asynchronous:
            return self._thread.submit(job)
        done: Future[T] = Future()
        try:
            done.set_result(job())
        except Exception as error:
            done.set_exception(error)
        return done


def _one_line(problems_of_ranks: Mapping[int, Sequence[str]]) -> str:
    """What the first rank that failed has to say, for all: a full disk can have a thousand."""
    rank, problems = min(problems_of_ranks.items())
    others = len(problems_of_ranks) - 1
    return f"rank {rank}{f' and {others} more' if others else ''}: {'; '.join(problems)}"


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "disttrain": __version__, "python": platform.python_version()}
