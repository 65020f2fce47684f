"""Starting the ranks of one machine through torch's elastic agent, in this very process."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from disttrain.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED

STOP_SECONDS = 300
"""How long ranks that were asked to stop may take for their checkpoint before they are killed."""


def launch_ranks(entry: Callable[..., Any], args: tuple[Any, ...], nproc: int, device_type: str) -> int:
    """Run `entry(*args)` in `nproc` processes until all are done; an exit code that says how they ended.

    A signal to this process reaches every rank; whether they left a committed checkpoint stands in status.json.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
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
        shutdown_timeout=STOP_SECONDS,
    )
    try:
        elastic_launch(config, entry)(*args)
    except SignalException:
        return EXIT_FAILED
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return EXIT_BAD_INPUT if EXIT_BAD_INPUT in codes else EXIT_FAILED
    return EXIT_DONE
