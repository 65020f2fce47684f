"""`disttrain` as a command, in a process that is forked from a server with torch in it: a tenth of a start's time.

This module does not import torch.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil

from disttrain.testing.process import PRELOAD, start_conditions


class Command:
    """A running command in a session of its own, with the interface of `subprocess.Popen` as far as it is used.

    `prepare` ("module:function") is called first, in the command's process, of which its ranks are forks.
    """

    def __init__(
        self, arguments: list[str], folder: Path, environment: Mapping[str, str], prepare: tuple[str, ...] = ()
    ) -> None:
        self.args = ["disttrain", *arguments]
        self._files = (folder / "stdout", folder / "stderr")
        self._process = _CONTEXT.Process(target=_serve, args=(arguments, self._files, dict(environment), prepare))
        with start_conditions():
            self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def session(self) -> list[psutil.Process]:
        """What lives in its session: itself, its ranks, and whatever they left behind."""
        found = []
        for process in psutil.process_iter(["status"]):
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """In the order in which they were started."""
        with suppress(psutil.NoSuchProcess):
            return sorted(psutil.Process(self.pid).children(), key=lambda child: child.pid)
        return []

    def end(self) -> None:
        """Kill all of it that is left."""
        self._process.kill()  # it may not have a session of its own yet
        for process in self.session():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()


_CONTEXT = ForkServerContext()
_CONTEXT.set_forkserver_preload(list(PRELOAD))


def wait_until(condition: Callable[[], object], seconds: float, pause: float = 0.02) -> bool:
    """Whether `condition()` came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def _serve(
    arguments: list[str], files: tuple[Path, Path], environment: Mapping[str, str], prepare: tuple[str, ...]
) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for descriptor, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.argv = ["disttrain", *arguments]
    for name in prepare:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)()
    runpy.run_module("disttrain", run_name="__main__")
