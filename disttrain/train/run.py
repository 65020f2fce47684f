"""One rank's part of a run, with what looks after it around the loop."""

from __future__ import annotations

import sys
from functools import partial

import torch

from disttrain.distributed.env import Ranks, job_end
from disttrain.monitor import Ending
from disttrain.resilience import StopRequest, Watchdog
from disttrain.train.folder import RunFolder
from disttrain.train.loop import TrainingLoop
from disttrain.train.preflight import PreparedRun


def run_training(run: PreparedRun, ranks: Ranks, device: torch.device) -> Ending:
    """Train to the end or to a requested stop, from the newest checkpoint if there is one. Collective.

    Raises UserError (on every rank) when the data, a checkpoint or the disk cannot be used.
    """
    settings, end = run.config.resilience, job_end()
    stop = StopRequest(
        file=run.folder.stop_file if ranks.is_first else None,
        deadline=end and end - settings.stop_before_limit_seconds,
    )
    watchdog = Watchdog(run.folder.hang, ranks, partial(_blame, run.folder))
    with stop, watchdog:
        loop = TrainingLoop(run, ranks, device, watchdog)
        try:
            state = loop.run(stop)
            loop.output.leave(state, stop.reason)
        except BaseException as error:
            loop.output.failed(error)
            raise
    return state


def _blame(folder: RunFolder, step: int, text: str) -> None:
    print(f"error: {text}; what every rank was doing is in {folder.hang}", file=sys.stderr, flush=True)
    folder.add_event("hang", step, text)
