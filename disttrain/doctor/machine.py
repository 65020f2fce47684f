"""What a machine allows its processes: limits, shared memory and the disk under the run folder. Facts only."""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

from disttrain.doctor.facts import Disk, Limits, SharedMemory

PROBE_BYTES = 16 << 20
SMALL_WRITES = 5


def gather_limits(root: Path = Path("/")) -> Limits:
    limit, used = _container_processes(root)
    if limit is None and os.getuid() != 0:  # root may have as many as it likes
        limit, used = _soft(resource.RLIMIT_NPROC), _threads_of_user(root)
    return Limits(
        open_files=_soft(resource.RLIMIT_NOFILE),
        locked_bytes=_soft(resource.RLIMIT_MEMLOCK),
        processes=limit,
        processes_used=used,
    )


def gather_shared_memory(folder: Path = Path("/dev/shm")) -> SharedMemory:
    try:
        room = os.statvfs(folder)
    except OSError as error:
        return SharedMemory(error=error.strerror)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        problem = None
    except OSError as error:
        problem = error.strerror
    return SharedMemory(
        total_bytes=room.f_frsize * room.f_blocks, free_bytes=room.f_frsize * room.f_bavail, error=problem
    )


def gather_disk(folder: Path) -> Disk:
    """Writes and removes a file of 16 MiB and a few small ones, in `folder` or the nearest one above that exists."""
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    try:
        room = os.statvfs(place)
        free_bytes, free_files = room.f_frsize * room.f_bavail, room.f_favail if room.f_files else None
    except OSError as error:
        return Disk(folder=str(place), error=error.strerror)
    if not place.is_dir():
        return Disk(folder=str(place), free_bytes=free_bytes, error="not a folder")
    speed = seconds = problem = None
    try:
        if free_bytes > PROBE_BYTES:
            speed = PROBE_BYTES / _write_seconds(place, PROBE_BYTES)
        seconds = statistics.median(_write_seconds(place, 4096) for _ in range(SMALL_WRITES))
    except OSError as error:
        problem = error.strerror
    return Disk(
        folder=str(place),
        free_bytes=free_bytes,
        free_files=free_files,
        error=problem,
        write_bytes_per_second=speed,
        fsync_seconds=seconds,
    )


def _write_seconds(folder: Path, count: int) -> float:
    """From the first byte until the disk says that it has all."""
    content = os.urandom(min(count, 1 << 20))  # some file systems store zeros as nothing
    with tempfile.TemporaryFile(dir=folder, prefix=".doctor-") as file:
        start = time.perf_counter()
        for _ in range(count // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - start


def _soft(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _container_processes(root: Path) -> tuple[int | None, int | None]:
    """pids.max of our own control group, seen from inside a container or from the machine."""
    for folder in (root / "sys/fs/cgroup", root / "sys/fs/cgroup/pids"):
        try:
            limit = (folder / "pids.max").read_text().strip()
            if limit != "max":
                return int(limit), int((folder / "pids.current").read_text())
        except (OSError, ValueError):
            continue
    return None, None


def _threads_of_user(root: Path) -> int | None:
    """Each thread counts against the limit of its user."""
    total = 0
    try:
        for process in (root / "proc").iterdir():
            if process.name.isdecimal():
                try:
                    total += sum(1 for _ in (process / "task").iterdir()) if process.stat().st_uid == os.getuid() else 0
                except OSError:  # it has ended meanwhile
                    continue
    except OSError:
        return None
    return total
