"""Who this process is and what the machine shows: the one place that reads the environment. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from disttrain.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all, and among those of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    elastic: bool = False
    """An elastic agent started us: it restarts whatever leaves with another code than 0."""
    ends_peers: bool = False
    """Our launcher ends all ranks as soon as one leaves with another code than 0 (srun as we call it, deepspeed)."""
    head: str = ""
    """Where rank 0 is, if only Slurm says so; else torch reads MASTER_ADDR and MASTER_PORT itself."""
    port: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """What torchrun (or a launcher that sets the same variables), or srun, says; None where no launcher started us.

    Raises UserError when only some of the variables are there or one is no number.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return _slurm_ranks(environment)
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise UserError(
            f"the environment has some of a launcher's variables, but not {', '.join(missing)}: start with torchrun, "
            "or unset RANK and WORLD_SIZE"
        )
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        port = int(environment["MASTER_PORT"])
        # The deepspeed launcher says LOCAL_SIZE.
        local_world = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world)
        local_rank = int(environment.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise UserError(
            f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_PORT must be whole numbers: {error}"
        ) from error
    _check_numbers(rank, world, local_rank, local_world, port)
    return Ranks(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        elastic="TORCHELASTIC_RUN_ID" in environment,
        ends_peers="CROSS_SIZE" in environment and "TORCHELASTIC_RUN_ID" not in environment,
    )


def _check_numbers(rank: int, world: int, local_rank: int, local_world: int, port: int) -> None:
    """UserError for ranks that cannot be: their peers would wait for them, or they for peers, until the timeout."""
    problems = [
        f"{name} = {value}, {of} = {count}: the first must be from 0 to {count - 1}; set both as torchrun does"
        for name, value, of, count in (
            ("RANK", rank, "WORLD_SIZE", world),
            ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world),
        )
        if count >= 1 and not 0 <= value < count
    ]
    if not 1 <= local_world <= world:
        problems.append(
            f"WORLD_SIZE = {world}, LOCAL_WORLD_SIZE = {local_world}: all processes, and those of this machine, which "
            "are at least 1 and at most all"
        )
    if not 0 < port < 1 << 16:
        problems.append(f"MASTER_PORT = {port}: must be from 1 to 65535")
    if problems:
        raise UserError(problems)


_FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""Steps from here on are Slurm's own: the batch script, the shell of salloc, and such."""


def _slurm_ranks(environment: Mapping[str, str]) -> Ranks | None:
    """One of several tasks of an srun; None in a batch script, an interactive shell (which has ranks to start), or
    outside Slurm."""
    if "SLURM_PTY_PORT" in environment or "SLURM_PROCID" not in environment:
        return None
    try:
        step = int(environment.get("SLURM_STEP_ID") or _FIRST_SPECIAL_STEP)
        world = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
        if step >= _FIRST_SPECIAL_STEP or world == 1:
            return None
        rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
        node = int(environment.get("SLURM_NODEID") or 0)
        per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
        job = int(environment["SLURM_JOB_ID"])
        head = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
        port = int(environment.get("MASTER_PORT") or 20_000 + (job + step) % 10_000)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"this is a step of srun, whose variables are not what Slurm sets ({error}): start with srun from sbatch "
            "or salloc, or unset SLURM_PROCID to start ranks here"
        ) from error
    local_world = _tasks_of_node(per_node, node) or world
    _check_numbers(rank, world, local_rank, local_world, port)
    return Ranks(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        ends_peers=True,
        head=head,
        port=port,
    )


def first_host(hosts: str) -> str:
    """Of a list as Slurm writes it: `n[03-07,9]-ib,m1` begins with n03-ib."""
    name, inside, rest = re.match(r"([^,\[]*)(?:\[(\w+)[^]]*])?([^,\[]*)", hosts).groups()  # type: ignore[union-attr]
    return name + (inside or "") + rest


def _tasks_of_node(counts: str, node: int) -> int | None:
    """`2(x3),1` is 2, 2, 2, 1."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        if node < int(times or 1):
            return int(count)
        node -= int(times or 1)
    return None


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """When the Slurm job that we are in will be ended (Unix time); None where nobody says."""
    try:
        return float(environment["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None


def visible_gpus(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> str | None:
    """Where this machine shows a GPU, in words: the scheduler's variables or the driver's files; None without one."""
    for variable in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "NVIDIA_VISIBLE_DEVICES"):
        value = environment.get(variable)
        if value is not None and value.strip() not in ("", "-1", "none", "void", "all", "NoDevFiles"):
            return f"{variable}={value}"
        if variable == "CUDA_VISIBLE_DEVICES" and value is not None:
            return None  # set to nothing: somebody hid the GPUs on purpose
    gpus = root / "proc/driver/nvidia/gpus"
    if gpus.is_dir() and any(gpus.iterdir()):
        return str(gpus)
    return None


def tell_engines(ranks: Ranks, on_cpu: bool) -> None:
    """Set what DeepSpeed and Accelerate read for themselves, where no launcher has set it."""
    told = {
        "RANK": ranks.rank,
        "WORLD_SIZE": ranks.world,
        "LOCAL_RANK": ranks.local_rank,
        "LOCAL_WORLD_SIZE": ranks.local_world,
    }
    if ranks.world > 1 or "MASTER_ADDR" in os.environ:
        for name, value in told.items():
            os.environ.setdefault(name, str(value))
    os.environ.setdefault("LOCAL_RANK", "0")
    if on_cpu:
        # Either would take a GPU that is there.
        os.environ["DS_ACCELERATOR"], os.environ["ACCELERATE_USE_CPU"] = "cpu", "true"


def usable_cores() -> int:
    """Cores that this process may use; a container or job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_variables(names: Iterable[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of the variables that are set, to something."""
    return {name: environment[name] for name in names if environment.get(name)}
