"""Starting the ranks of one machine through torch's elastic agent, in this very process, and starting them again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from disttrain.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_GIVE_UP
from disttrain.resilience import StopRequest, heard_signals

STOP_SECONDS = 300
"""How long ranks that were asked to stop may take for their checkpoint before they are killed."""
LEAVE_SECONDS = 4.0
"""How long the peers of a rank that died may take before they are killed."""
LOOK_SECONDS = 0.2
FORK_SECONDS = 0.01
"""About as long as the fork of a rank takes."""


@dataclass(frozen=True)
class Ended:
    """How a start of the ranks ended."""

    code: int
    """EXIT_DONE also where they stopped on request: status.json knows which."""
    what: str = ""
    """Which rank died of what, for people."""

    @property
    def may_start_again(self) -> bool:
        """A rank died or hung; bad input, numbers gone bad and a disk that refuses come again."""
        return self.code == EXIT_FAILED


def launch_ranks(
    entry: Callable[..., Any], args: tuple[Any, ...], nproc: int, device_type: str, stop: StopRequest
) -> Ended:
    """Run `entry(*args)` in `nproc` processes until all are done, or one has died and the others were ended.

    A stop signal to this process reaches every rank; whether they left a committed checkpoint stands in status.json.
    `stop` has heard the signals that came before this call.
    """
    _silence_agent()
    # torchrun does the same: as many threads as cores in every process would fight for them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    forking = device_type == "cpu"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        # A new one for each start: what the last ranks left in an old one keeps new ranks from meeting.
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        # Forked ranks start with torch imported; CUDA does not survive a fork.
        start_method="fork" if forking else "spawn",
        **_agent_options(),
    )
    gate = _Gate(nproc) if forking else None
    undertaker = _Undertaker(gate)
    try:
        with _signals_reach_ranks(stop), undertaker:
            if gate is None:
                elastic_launch(config, entry)(*args)
            else:
                elastic_launch(config, _enter)(gate, entry, args)
    except SignalException:
        return Ended(EXIT_DONE)
    except ChildFailedError as error:
        return _how_it_failed(error, undertaker.dead)
    finally:
        # A signal while ranks were being forked leaves some that the agent does not know of.
        for rank in multiprocessing.active_children():
            rank.kill()
            rank.join(LEAVE_SECONDS)
        if gate is not None:
            gate.close()
    return Ended(EXIT_DONE)


def _agent_options() -> dict[str, Any]:
    """What this torch's agent lets be said about stopping; older ones have their own way with signals."""
    options = {
        # The stop signals are ours: the agent would end ranks that are still at their last checkpoint.
        "signals_to_handle": "SIGQUIT",
    }
    known = {field.name for field in fields(LaunchConfig)}
    return {name: value for name, value in options.items() if name in known}


@contextmanager
def _signals_reach_ranks(stop: StopRequest) -> Iterator[None]:
    """A stop signal is passed on to the ranks, which end by themselves; later ones change nothing."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        first, stop.reason = stop.reason is None, stop.reason or signal.Signals(number).name
        if not first:
            return
        ranks = multiprocessing.active_children()
        if not ranks:
            raise SignalException(f"got signal {number} before there were ranks", signal.Signals(number))
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank.pid or 0, signal.SIGTERM)
        threading.Thread(target=_kill_later, args=(ranks,), daemon=True).start()

    before = {number: signal.signal(number, on_signal) for number in heard_signals()}
    try:
        if stop.wanted:
            raise SignalException("got a signal before the ranks were started", signal.SIGTERM)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Gate:
    """Forked ranks wait here until the last of them is there.

    A rank that came earlier would call at the agent's store, a thread of this process, which looks up where the call
    is from; a rank that is forked in that moment finds libc's lock on such lookups taken, for ever.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._read, self._write = os.pipe()

    def open(self) -> None:
        """By the process that forks ranks: a byte for each."""
        os.write(self._write, bytes(self.ranks))

    def wait(self) -> None:
        """In a rank."""
        os.read(self._read, 1)

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def _enter(gate: _Gate, entry: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # The handlers are those of the process that forked us.
    for number in heard_signals():
        signal.signal(number, signal.SIG_DFL)
    gate.wait()
    gate.close()
    entry(*args)


class _Undertaker:
    """Lets ranks begin when all are there, remembers who died first, and ends their peers: the agent gives these half a
    minute, whatever it is told, which one that is stopped or hangs would use up."""

    def __init__(self, gate: _Gate | None) -> None:
        self.gate = gate
        self.dead: dict[int, tuple[int, int]] = {}
        """Process and exit code by rank, of those that had failed when the first death was seen."""
        self._ranks: list[Any] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="undertaker", daemon=True)

    def __enter__(self) -> _Undertaker:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if not self.dead:
            self._look()

    def _watch(self) -> None:
        while self.gate and len(self._ranks) < self.gate.ranks and not self._over.wait(FORK_SECONDS):
            self._look()
        if self.gate:
            self.gate.open()
        while not self.dead and not self._over.wait(LOOK_SECONDS):
            self._look()
        if not self._over.wait(LEAVE_SECONDS):
            for rank in self._ranks:
                rank.kill()

    def _look(self) -> None:
        # Not active_children, which would collect the dead, whose exit codes the agent wants to see.
        children = multiprocessing.process._children  # type: ignore[attr-defined]
        self._ranks = sorted({*self._ranks, *children}, key=lambda child: child.pid)
        self.dead = {rank: (child.pid, code) for rank, child in enumerate(self._ranks) if (code := child.exitcode)}


def _kill_later(ranks: list[Any]) -> None:
    time.sleep(STOP_SECONDS)
    for rank in ranks:
        rank.kill()


def _how_it_failed(error: ChildFailedError, dead: dict[int, tuple[int, int]]) -> Ended:
    """By the rank that ended first, if its exit code has a meaning; a rank that was killed cannot say so itself."""
    codes = {failure.exitcode for failure in error.failures.values()} | {code for _, code in dead.values()}
    code = next((code for code in (EXIT_BAD_INPUT, EXIT_GIVE_UP) if code in codes), EXIT_FAILED)
    # SIGTERM is what the agent sends to the others.
    killed = {rank: one for rank, one in dead.items() if one[1] < 0 and one[1] != -signal.SIGTERM}
    if not killed:
        return Ended(code)
    rank, (process, number) = min(killed.items())
    what = f"rank {rank} on {socket.gethostname()} (process {process}) was killed by {signal.Signals(-number).name}"
    return Ended(code, what)


def _silence_agent() -> None:
    """What its loggers report (a signal, a failed rank) we say in our words; each of them has a level of its own."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
