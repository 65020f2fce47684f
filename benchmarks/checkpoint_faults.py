"""The trials behind `benchmarks/faults.py checkpoints` that change files: damage and malice."""

from __future__ import annotations

import random
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from disttrain.testing import RankPool, checkpoints, faults
from disttrain.testing.checkpoints import FELL_BACK, NEWER, OLDER
from disttrain.testing.hostile import HOSTILE, MARKER, MAY_GO_UNSAID

JOBS = "disttrain.testing.checkpoints"
OLDER_NAME, NEWER_NAME = f"step-{OLDER:08d}", f"step-{NEWER:08d}"
SHOWN_FAILURES = 20
MEMORY_BYTES = 2**29


@dataclass
class Row:
    """One kind of fault: how often tried, how often it ended as it must, and what else is worth a word."""

    fault: str
    trials: int = 0
    passed: int = 0
    failures: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    not_run: str = ""

    def add(self, what: str, problem: str) -> None:
        self.trials += 1
        if not problem:
            self.passed += 1
        elif len(self.failures) < SHOWN_FAILURES:
            self.failures.append(f"{what}: {problem}")

    def judge(self, what: str, outcome: str) -> None:
        """Of a trial that damaged the newer checkpoint."""
        self.add(what, "" if outcome == FELL_BACK else outcome)


class Damage:
    """A pair of checkpoints that several ranks wrote; each trial changes the newer one, loads, and puts it back."""

    def __init__(self, directory: Path, rows: int) -> None:
        self.directory, self.rows = directory, rows
        self.older, self.newer = directory / OLDER_NAME, directory / NEWER_NAME
        self.shards = sorted(self.newer.glob("*.safetensors"))
        self.files = sorted(self.newer.iterdir())

    @classmethod
    def saved(cls, pool: RankPool, directory: Path, world: int, rows: int) -> Damage:
        pool.run(f"{JOBS}:save_pair", world, directory=directory, rows=rows)
        return cls(directory, rows)

    def trial(self, row: Row, what: str, damage: Callable[[], object], silent: bool = False) -> None:
        with faults.damaged(self.newer):
            damage()
            row.judge(what, checkpoints.outcome(self.directory, self.rows, silent))


def bit_flips(pair: Damage, trials: int, rng: random.Random) -> Row:
    row = Row("one bit flipped")
    bits = faults.covering_bits(pair.newer, rng)
    row.counts["fields"] = len(bits)
    bits += [faults.random_bit(pair.newer, rng) for _ in range(trials - len(bits))]
    for path, bit in bits[:trials]:
        pair.trial(row, f"{path.name}, bit {bit}", partial(faults.flip_bit, path, bit))
    row.counts["fields hit"] = min(row.counts.pop("fields"), trials)
    return row


def zeroed_pages(pair: Damage, trials: int, rng: random.Random) -> Row:
    row = Row("4 KiB zeroed")
    for _ in range(trials):
        path = rng.choice(pair.shards)
        page = rng.choice(faults.pages_with_data(path))
        pair.trial(row, f"{path.name}, page {page}", partial(faults.zero_page, path, page))
    return row


def truncations(pair: Damage, trials: int, rng: random.Random) -> Row:
    row = Row("truncated")
    for index in range(trials):
        path = rng.choice(pair.files)
        size = path.stat().st_size
        kept = (0, size - 1, rng.randrange(size), rng.randrange(size))[index % 4]
        pair.trial(row, f"{path.name} to {kept}", partial(faults.truncate, path, kept))
    return row


def swapped_files(pair: Damage, other: Damage, trials: int, rng: random.Random) -> Row:
    """Files of the older step and of another run, half of them with a manifest that was made to agree."""
    row = Row("file of another step or run")
    for index in range(trials):
        path = rng.choice(pair.shards)
        donor = (pair.older, other.newer)[index % 2] / path.name
        agrees = index % 4 > 1

        def swap(path: Path = path, donor: Path = donor, agrees: bool = agrees) -> None:
            faults.replace(path, donor)
            if agrees:
                faults.resign_file(path)

        pair.trial(row, f"{path.name} of {donor.parent}{', signed' * agrees}", swap)
    return row


def missing_files(pair: Damage, trials: int, rng: random.Random) -> Row:
    row = Row("file missing")
    for index in range(trials):
        path = pair.newer / faults.MANIFEST if index % 5 == 0 else rng.choice(pair.shards)
        pair.trial(row, path.name, path.unlink, silent=path.name == faults.MANIFEST)
    return row


@contextmanager
def guarded() -> Iterator[None]:
    """A hang ends after ten seconds, and a huge allocation fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    try:
        with checkpoints.time_limit(10):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def hostile_files(pair: Damage) -> Row:
    row = Row("hostile file")
    for what, make in HOSTILE.items():
        with tempfile.TemporaryDirectory() as scratch, faults.damaged(pair.newer):
            try:
                make(pair.newer, Path(scratch))
            except PermissionError:
                row.counts["not permitted here"] += 1
                continue
            with guarded():
                found = checkpoints.outcome(pair.directory, pair.rows, silent=what in MAY_GO_UNSAID)
            if Path(scratch, MARKER).exists():
                found = "ran what the file says"
            row.judge(what, found)
    return row
