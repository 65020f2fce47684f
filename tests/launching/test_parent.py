"""A process whose parent was killed is gone too."""

from __future__ import annotations

import sys

import psutil
import pytest

from tests.cli.helpers import started

CHILD = """
import time
from disttrain.launching.parent import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", sys.argv[1]]).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_dies_with_its_parent() -> None:
    with started(sys.executable, "-c", PARENT, CHILD) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        (number,) = said - {"ready"}
        child = psutil.Process(int(number))
        assert child.is_running()
        parent.kill()
        parent.wait()
        child.wait(timeout=10)
