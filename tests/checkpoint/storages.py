"""Disks that wait, and disks that refuse."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.tensor_file import disk_problem
from disttrain.errors import StorageError


class GatedStorage(LocalStorage):
    """Writes data only while `gate` is open."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.gate = threading.Event()

    def write(self, *args: Any) -> Any:
        assert self.gate.wait(timeout=30)
        return super().write(*args)


class RefusingStorage(LocalStorage):
    """Raises `code` from each of `operations` (begin, write, commit, remove) as often as `times` says."""

    def __init__(self, directory: Path, code: int, operations: tuple[str, ...], times: int = 1) -> None:
        super().__init__(directory)
        self.error = OSError(code, errno.errorcode[code])
        self.times = times
        for operation in operations:
            setattr(self, operation, self._refusing(getattr(self, operation)))

    def _refusing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if self.times > 0:
                self.times -= 1
                raise StorageError(disk_problem(self.directory, self.error))
            return method(*args)

        return call
