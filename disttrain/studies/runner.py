"""Training what a plan still lacks, cell by cell; several machines that share the folder share the cells.

A cell is claimed by a lock on a file, which the system takes away from a process that dies. What fails or is killed
stays for the next call and ends nothing else; here it is tried once, and once more where it was killed.
"""

from __future__ import annotations

import fcntl
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from disttrain.config import RunConfig
from disttrain.errors import UserError
from disttrain.studies.cells import cell_config
from disttrain.studies.folder import ComparisonFolder
from disttrain.studies.outcomes import Outcome, read_outcome, state_of
from disttrain.studies.plan import Cell, Plan
from disttrain.studies.stages import stages

LOOK_SECONDS = 1.0
"""Between looks at cells that others train."""
Train = Callable[[RunConfig, Path], None]
"""Trains a config to its end or to where it can, with what it says in a file; what came of it stands in its folder."""


class StoppedError(Exception):
    """On request; what is done stays, and the next call goes on."""


@dataclass
class Runner:
    """`train` trains one cell, `say` tells the user, `stopped` is asked between cells."""

    base: RunConfig
    plan: Plan
    folder: ComparisonFolder
    train: Train
    say: Callable[[str], None]
    stopped: Callable[[], bool] = lambda: False
    outcomes: dict[Cell, Outcome] = field(default_factory=dict)
    failed: set[Cell] = field(default_factory=set)
    """Tried by this call."""

    def run(self) -> None:
        """Every stage in turn; raises StoppedError on request."""
        waiting = False
        while lacking := self._lacking():
            worked = self._pass(lacking)
            if not worked and not waiting:
                self.say(f"waiting for {len(lacking)} runs that others have claimed, first {lacking[0]}")
            waiting = not worked
            if waiting:
                time.sleep(LOOK_SECONDS)

    @property
    def losses(self) -> dict[Cell, float]:
        return {cell: outcome.loss for cell, outcome in self.outcomes.items()} | dict.fromkeys(self.failed, math.inf)

    def _lacking(self) -> list[Cell]:
        """Of the first stage that is not complete; what others have done meanwhile is taken over."""
        while True:
            known = self.losses
            stage = next((cells for cells in stages(self.plan, known) if any(c not in known for c in cells)), [])
            found = {cell: read_outcome(self.folder.cell(cell)) for cell in stage if cell not in known}
            done = {cell: outcome for cell, outcome in found.items() if outcome is not None}
            self.outcomes |= done
            if lacking := [cell for cell in found if cell not in done]:
                return lacking
            if not found:
                return []

    def _pass(self, lacking: list[Cell]) -> bool:
        """Train what nobody else trains; whether anything was to be done."""
        worked = False
        for cell in lacking:
            if self.stopped():
                raise StoppedError
            with claimed(self.folder.claim(cell)) as mine:
                if mine:
                    worked = True
                    self._cell(cell)
        return worked

    def _cell(self, cell: Cell) -> None:
        place = self.folder.cell(cell)
        outcome = read_outcome(place)  # somebody may have ended it before we got hold of it
        if outcome is None:
            self._train(cell, place)
            if state_of(place) == "running" and not self.stopped():
                self._train(cell, place)  # killed, which says nothing about its rate: it resumes, once
            outcome = read_outcome(place)
        if outcome is not None:
            self.outcomes[cell] = outcome
            self.say(f"{self._position()} {cell}: loss {outcome.loss:.4f} ({self._left()})")
            return
        if self.stopped():
            raise StoppedError
        self.failed.add(cell)
        self.say(f"{self._position()} {cell}: failed, {_last_word(self.folder.log(cell))}; see {self.folder.log(cell)}")

    def _train(self, cell: Cell, place: Path) -> None:
        self.train(cell_config(self.base, self.plan, cell, str(place)), self.folder.log(cell))

    def _position(self) -> str:
        total = self.plan.search_cells + self.plan.final_cells
        return f"[{len(self.outcomes) + len(self.failed)}/{total}]"

    def _left(self) -> str:
        """By the runs that have ended, on one machine."""
        total = self.plan.search_cells + self.plan.final_cells
        seconds = sum(outcome.wall_seconds for outcome in self.outcomes.values()) / len(self.outcomes)
        left = seconds * (total - len(self.outcomes) - len(self.failed))
        return f"about {left / 60:.0f} min left on one machine" if left >= 60 else f"about {left:.0f} s left"


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the cell is ours. A child that we fork to train holds the claim with us, and longer if we die first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise UserError(
                f"{path}: cannot be locked: {error.strerror}; choose a --folder whose disk has locks"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield True


def _last_word(log: Path) -> str:
    """What a run said last, for people."""
    lines: list[str] = []
    with suppress(OSError):
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if line.startswith("error")), lines[-1] if lines else "without a word"
    )
