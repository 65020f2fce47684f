"""Ranks whose agent was killed must not train on alone. No torch here."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def die_with_parent() -> None:
    """Have the system kill this process when its parent dies, however that happens; on Linux, elsewhere nothing.

    An agent that was killed cannot end its ranks: they would train on to the end, and their peers on other nodes would
    never learn that the node is to be started again.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
