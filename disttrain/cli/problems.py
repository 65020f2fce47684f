"""How bad input is shown, and how a process leaves because of it. No torch here."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NoReturn

from disttrain.distributed.env import Ranks
from disttrain.errors import UserError

SAME_PROBLEM_SECONDS = 2.0
"""As a rule all ranks have the same problem: the first one leaves at once, and its launcher ends the others."""


def leave_with_problems(error: UserError, ranks: Ranks, code: int | None = None) -> NoReturn:
    """Print each problem as one line and leave with `code`, or the error's own, without waiting in a teardown.

    A rank other than the first speaks only when it outlives the first one: then the problem is its own.
    """
    prefix = ""
    if not ranks.is_first:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SAME_PROBLEM_SECONDS)
        prefix = f"rank {ranks.rank}: "
    print("\n".join(f"error: {prefix}{problem}" for problem in error.problems), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(error.exit_code if code is None else code)
