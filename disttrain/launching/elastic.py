"""Starting the ranks of one machine through torch's elastic agent, in this very process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from disttrain.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from disttrain.resilience import STOP_SIGNALS, StopRequest

STOP_SECONDS = 300
"""How long ranks that were asked to stop may take for their checkpoint before they are killed."""


def launch_ranks(
    entry: Callable[..., Any], args: tuple[Any, ...], nproc: int, device_type: str, earlier: StopRequest
) -> int:
    """Run `entry(*args)` in `nproc` processes until all are done; an exit code that says how they ended.

    A stop signal to this process reaches every rank; whether they left a committed checkpoint stands in status.json.
    `earlier` has heard the signals that came before this call.
    """
    _silence_agent()
    # torchrun does the same: as many threads as cores in every process would fight for them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        # Forked ranks start with torch imported; CUDA does not survive a fork.
        start_method="fork" if device_type == "cpu" else "spawn",
        **_agent_options(),
    )
    try:
        with _first_signal_raises(earlier):
            elastic_launch(config, entry)(*args)
    except SignalException:
        return EXIT_PREEMPTED
    except ChildFailedError as error:
        return _code_of_failure(error)
    finally:
        # A signal while ranks were being forked leaves some that the agent does not know of.
        for rank in multiprocessing.active_children():
            rank.kill()
    return EXIT_DONE


def _agent_options() -> dict[str, Any]:
    """What this torch's agent lets be said about stopping; older ones wait 30 s and have their own way with signals."""
    options = {
        "shutdown_timeout": STOP_SECONDS,
        # The stop signals are ours: the agent's own handlers would let a second signal break off the stop.
        "signals_to_handle": "SIGQUIT",
    }
    known = {field.name for field in fields(LaunchConfig)}
    return {name: value for name, value in options.items() if name in known}


@contextmanager
def _first_signal_raises(earlier: StopRequest) -> Iterator[None]:
    """The agent answers a SignalException by stopping its ranks; later stop signals are ignored while it does so."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Not SIG_IGN: Python complains on stderr of a signal that came while its handler was taken away.
        for ignored in STOP_SIGNALS:
            signal.signal(ignored, lambda number, frame: None)
        raise SignalException(f"got signal {number}", signal.Signals(number))

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        if earlier.wanted:
            raise SignalException("got a signal before the ranks were started", signal.SIGTERM)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code_of_failure(error: ChildFailedError) -> int:
    """The exit code of the rank that ended first, if it has a meaning; a rank that was killed cannot say so itself."""
    codes = {failure.exitcode for failure in error.failures.values()}
    for rank, failure in error.failures.items():
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"error: rank {rank} (process {failure.pid}) was killed by {name}", file=sys.stderr, flush=True)
    return next((code for code in (EXIT_BAD_INPUT, EXIT_PREEMPTED) if code in codes), EXIT_FAILED)


def _silence_agent() -> None:
    """What its loggers report (a signal, a failed rank) we say in our words; each of them has a level of its own."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
