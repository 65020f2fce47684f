"""Watchdogs of ranks that do not look at the same moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RANK = """
import os, select, sys, time
from pathlib import Path
from disttrain.distributed.env import Ranks
from disttrain.resilience import Watchdog

folder, rank, limit = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with Watchdog(folder, Ranks(rank, 2, rank, 2), lambda step, text: print(text, flush=True)) as watchdog:
    watchdog.enter("a step", limit, 7)
    sys.stdin.read()  # as a collective waits for a peer: until it is gone
    os._exit(9)
"""


def test_the_rank_that_speaks_ends_before_its_peers(tmp_path: Path) -> None:
    """One that looked a second later lost the peers that it was to accuse, and nobody was named."""
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    peer = subprocess.Popen([*command, "1", "0.1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with peer, subprocess.Popen([*command, "0", "1.5"], stdin=peer.stdout, stdout=subprocess.PIPE, text=True) as first:
        said, _ = first.communicate(timeout=60)
        assert (first.returncode, peer.wait(timeout=60)) == (1, 1)
    assert said.startswith("no progress in step 7 for ")
