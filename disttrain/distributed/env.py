"""Who this process is and what the machine shows: the one place that reads the environment. No torch here."""

from __future__ import annotations

import os
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

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """What torchrun (or a launcher that sets the same variables) says; None where no launcher started us.

    Raises UserError when only some of the variables are there or one is no number.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise UserError(
            f"the environment has some of a launcher's variables, but not {', '.join(missing)}: start with torchrun, "
            "or unset RANK and WORLD_SIZE"
        )
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Ranks(
            rank=rank,
            world=world,
            local_rank=int(environment.get("LOCAL_RANK", rank)),
            local_world=int(environment.get("LOCAL_WORLD_SIZE", world)),
            elastic="TORCHELASTIC_RUN_ID" in environment,
        )
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers: {error}") from error


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


def usable_cores() -> int:
    """Cores that this process may use; a container or job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_variables(names: Iterable[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of the variables that are set, to something."""
    return {name: environment[name] for name in names if environment.get(name)}
