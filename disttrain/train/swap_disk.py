"""The disk that DeepSpeed keeps parameters on (deepspeed.offload_parameters = "nvme"): checks, and the run's folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from disttrain.config import RunConfig
from disttrain.config.deepspeed_nvme import swap_folder
from disttrain.errors import UserError

_PROGRAM = "#include <libaio.h>\nint main() { io_context_t context = 0; return io_setup(8, &context); }\n"
_WANTED = "deepspeed.offload_parameters = 'nvme'"


def check_swap_disk(config: RunConfig) -> None:
    """UserError where this machine cannot: DeepSpeed itself would find out when the model is built."""
    if config.deepspeed.offload_parameters != "nvme" or config.deepspeed.nvme_path is None:
        return
    problems = [_folder_problem(config.deepspeed.nvme_path), None if _built_before() else libaio_problem()]
    if found := [problem for problem in problems if problem]:
        raise UserError(found)


@contextmanager
def swap_space(config: RunConfig) -> Iterator[None]:
    """The run's own folder on that disk: what an earlier start has left there goes at once, the rest at the end."""
    folder = swap_folder(config)
    if folder is None:
        yield
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folder_problem(said: str) -> str | None:
    where, path = f"deepspeed.nvme_path = {said}", Path(said).expanduser()
    if not path.is_dir():
        return f"{where}: there is no such folder; make one on a local disk of each machine"
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".disttrain-") as file:
            # As DeepSpeed opens its files; what lies in memory only (tmpfs) may refuse it.
            os.close(os.open(file.name, os.O_RDWR | getattr(os, "O_DIRECT", 0)))
    except OSError as error:
        return f"{where}: cannot be written past the system's cache ({error.strerror}); name a folder on a local disk"
    return None


def _built_before() -> bool:
    """DeepSpeed was installed with DS_BUILD_AIO=1, and compiles nothing."""
    spec = find_spec("deepspeed")
    places = (spec and spec.submodule_search_locations) or ()
    return any(list(Path(place).glob("ops/aio/async_io_op*.so")) for place in places)


def libaio_problem() -> str | None:
    """Why DeepSpeed cannot compile and use what reads and writes here."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return f"{_WANTED}: DeepSpeed compiles what reads and writes, and there is no C++ compiler; install g++"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        command = [compiler, "-x", "c++", "-", "-laio", "-o", str(program)]
        if subprocess.run(command, input=_PROGRAM.encode(), capture_output=True, check=False).returncode:
            return (
                f"{_WANTED}: DeepSpeed reads and writes through libaio, which the compiler does not find here; install "
                "libaio-dev (Debian, Ubuntu) or libaio-devel (Red Hat), or name its folders in CPATH and LIBRARY_PATH"
            )
        if subprocess.run([program], capture_output=True, check=False).returncode:
            return f"{_WANTED}: this system's kernel, or its sandbox, refuses io_setup, which libaio needs"
    return None
