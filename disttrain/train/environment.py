"""What a run ran on: for its folder, its report and W&B."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch

from disttrain import __version__
from disttrain.distributed.env import Ranks

_GIT_SECONDS = 5.0


def describe_environment(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "disttrain": __version__,
        "code_version": code_version(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {os.cpu_count()} cores",
        **({"cuda": torch.version.cuda} if cuda else {}),
        "world": ranks.world,
        "threads_per_rank": torch.get_num_threads(),
        "command": shlex.join(sys.argv),
    }


def code_version() -> str:
    """The commit of the working folder, marked when files differ from it; 'unknown' outside a repository."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"
