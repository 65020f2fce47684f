"""A thread in every rank that notices when the rank stays where it is, writes down where that is, and ends it."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from disttrain.distributed.env import Ranks
from disttrain.errors import EXIT_FAILED
from disttrain.resilience.hang import Whereabouts, accuse, last_collective, read_whereabouts

LOOK_SECONDS = 0.5
WAIT_SECONDS = 3.0
"""For what the other ranks have to say: all of them have been waiting about as long."""
SPEAKER_FIRST_SECONDS = 2.0
"""How long the others stay after that: a collective of the rank that is to speak would fail with their end."""


class Watchdog:
    """`enter(phase, seconds)` begins something that may take so long; nothing is watched before the first call.

    When a rank hangs, every rank that can writes `folder`/rank-R.json and ends the process with `EXIT_FAILED`, for a
    collective waits for all. The lowest rank that wrote also says who is to blame, once the others have written.
    """

    def __init__(self, folder: Path, ranks: Ranks, blame: Callable[[int, str], None]) -> None:
        self.folder, self.ranks, self.blame = folder, ranks, blame
        self.step = 0
        self._now = ("", float("inf"), time.monotonic())
        """Phase, how long it may take, since when: one object, for another thread reads it."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._began = time.time()
        self._main = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def enter(self, phase: str, seconds: float, step: int) -> None:
        self.step, self._now = step, (phase, seconds, time.monotonic())

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(LOOK_SECONDS):
            gap, looked = time.monotonic() - looked, time.monotonic()
            phase, limit, since = self._now
            if gap > 10 * LOOK_SECONDS:
                # The process itself stood still (a laptop asleep, a job suspended): nobody could have got on.
                self._now = (phase, limit, since + gap)
            elif looked - since > limit:
                self._tell(phase, looked - since)

    def _tell(self, phase: str, stayed: float) -> None:
        before = self._now
        frames = sys._current_frames()
        stack = traceback.format_stack(frames[self._main]) if self._main in frames else []
        account = Whereabouts(
            rank=self.ranks.rank,
            host=socket.gethostname(),
            process=os.getpid(),
            step=self.step,
            phase=phase,
            seconds=stayed,
            collective=last_collective(_flight_record()),
            stack=stack,
        )
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            whole = self.folder / f"rank-{self.ranks.rank}.json.tmp"
            whole.write_text(json.dumps(vars(account), indent=1) + "\n", encoding="utf-8")
            whole.replace(whole.with_suffix(""))
        if self._stop.wait(WAIT_SECONDS) or self._now is not before:
            return  # it was slow, not stuck
        # What an earlier start has left stays there for people.
        found = read_whereabouts(self.folder, since=self._began)
        if found and min(found) == self.ranks.rank:
            self.blame(self.step, accuse(found, self.ranks.world))
        else:
            time.sleep(SPEAKER_FIRST_SECONDS)
        os._exit(EXIT_FAILED)


def _flight_record() -> dict[str, Any]:
    """torch's record of this rank's last collectives; empty where this torch has none."""
    with suppress(Exception):
        from torch._C import _distributed_c10d

        dump: Any = _distributed_c10d
        return dict(json.loads(dump._dump_fr_trace_json()))
    return {}
