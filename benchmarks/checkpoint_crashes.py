"""The trials behind `benchmarks/faults.py checkpoints` that end processes and fill disks."""

from __future__ import annotations

import os
import random
import re
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint_faults import JOBS, Row

from disttrain.testing import RankPool, checkpoints, faults
from disttrain.testing.checkpoints import LARGE_ROWS, NEWER, OLDER

COMMIT_SECONDS = 60.0
WORLD = 2
KEEP_BOTH = 1


def fork_rank(rank: int, world: int, folder: Path, asynchronous: bool) -> int:
    """A process with torch already in it; what it prints goes to a file."""
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        with (folder / f"rank-{rank}.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=world)
        checkpoints.save_until_killed(rank, world, folder / "checkpoints", folder / "log", asynchronous)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(3)


def kill_trial(folder: Path, rng: random.Random, asynchronous: bool, all_at_once: bool) -> tuple[str, bool]:
    """Let two ranks save, kill them, and load: an empty string or what is wrong, and whether a save was cut short."""
    log = folder / "log"
    ranks = [fork_rank(rank, WORLD, folder, asynchronous) for rank in range(WORLD)]
    ended: set[int] = set()
    try:
        deadline = time.monotonic() + COMMIT_SECONDS
        while len(checkpoints.commits(log)) < 2:
            ended |= {process for process in ranks if process not in ended and os.waitpid(process, os.WNOHANG)[0]}
            if ended or time.monotonic() > deadline:
                said = [path.read_text().strip()[-300:] for path in folder.glob("rank-*.txt")]
                return f"the ranks did not get as far as two commits: {said}", False
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))
        rng.shuffle(ranks)
        os.kill(ranks[0], signal.SIGKILL)
        if not all_at_once:
            time.sleep(rng.uniform(0.02, 0.2))
    finally:
        for process in ranks:
            if process not in ended:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
    return checkpoints.after_kill(folder / "checkpoints", log)


def kills(trials: int, rng: random.Random) -> Row:
    row = Row("kill -9 in a save")
    for index in range(trials):
        asynchronous, all_at_once = index % 2 == 1, index % 4 < 2
        how = f"{'beside' if asynchronous else 'in'} the training, {'all ranks' if all_at_once else 'one rank first'}"
        with tempfile.TemporaryDirectory(prefix="kill-") as folder:
            problem, torn = kill_trial(Path(folder), rng, asynchronous, all_at_once)
        row.counts["save cut short"] += torn
        row.add(f"trial {index}, {how}", problem)
    return row


# Full.


def full_disks(pool: RankPool, sizes: int) -> Row:
    """Disks from "only the first step fits" to "both fit"; one third of them differs by pages around the manifest."""
    row = Row("disk full")
    try:
        with checkpoints.small_disk(64 * 2**20) as place:
            pool.run(f"{JOBS}:save_step", WORLD, directory=place / "c", **_settings(OLDER, KEEP_BOTH))
            first = _used(place)
            pool.run(f"{JOBS}:save_step", WORLD, directory=place / "c", **_settings(NEWER, KEEP_BOTH))
            both = _used(place)
    except PermissionError as error:
        row.not_run = f"no file system can be mounted here ({error})"
        return row
    near = max(1, sizes // 3)
    spread = [first + (both - first) * (i + 1) // (sizes - near + 1) for i in range(sizes - near)]
    spread += [both - (near - 2 - i) * faults.PAGE_BYTES for i in range(near)]
    for index, size in enumerate(spread):
        size -= size % faults.PAGE_BYTES
        row.add(f"{size:,} of {both:,} bytes", _full_disk(pool, size, index, fits=size >= both))
        row.counts["fits" if size >= both else "does not fit"] += 1
    return row


def _settings(step: int, index: int) -> dict[str, int | bool]:
    return {"step": step, "rows": LARGE_ROWS, "keep_last": 1 + index % 2, "asynchronous": index % 4 > 1}


def _used(place: Path) -> int:
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _full_disk(pool: RankPool, size: int, index: int, fits: bool) -> str:
    with checkpoints.small_disk(size) as place:
        directory = place / "c"
        if any(pool.run(f"{JOBS}:save_step", WORLD, directory=directory, **_settings(OLDER, index))):
            return "the first step did not fit"
        ranks = pool.run(f"{JOBS}:save_step", WORLD, directory=directory, **_settings(NEWER, index))
        problem = _full_disk_problem(directory, ranks, fits)
        found = checkpoints.manager(directory).latest()
        if found is None or found.rejected or found.manifest.step != (NEWER if fits else OLDER):
            return problem or f"found {found}"
        state = {name: torch.zeros_like(t) for name, t in checkpoints.whole_state(OLDER, LARGE_ROWS).items()}
        checkpoints.manager(directory).load(state, found)
        if not checkpoints.same_bits(state, checkpoints.whole_state(found.manifest.step, LARGE_ROWS)):
            return "other bits were loaded"
        return problem


def _full_disk_problem(directory: Path, ranks: list[tuple[str, ...]], fits: bool) -> str:
    if fits:
        return f"it fits, yet: {ranks}" if any(ranks) else ""
    if ranks[0] != ranks[1] or len(ranks[0]) != 1:
        return f"not one line, the same everywhere: {ranks}"
    [line] = ranks[0]
    numbers = re.search(r"of [\d,]+ bytes", line) and re.search(r"[\d,]+ bytes free", line)
    if not line.isprintable() or str(directory) not in line or not numbers:
        return f"not the place, the bytes needed and the bytes free: {line}"
    left = [path.name for path in directory.iterdir() if ".tmp-" in path.name]
    return f"left behind: {left}" if left else ""
