"""What shall be started where: the config, the mesh on these nodes, and what a cluster wants to know. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from disttrain.config import RunConfig
from disttrain.config.load import layout_problems, load_config
from disttrain.errors import UserError
from disttrain.launching.wishes import KUBERNETES, TIME, Wishes, excluded_nodes, wish_problems

SIGNAL_SECONDS = 60
"""How long before a run looks at the clock itself Slurm is asked to send its signal."""
VOLUMES = {**dict.fromkeys(KUBERNETES, PurePosixPath("/workspace/runs")), "skypilot": PurePosixPath("/runs")}
"""Where pods, or SkyPilot's machines, see the volume that outlives them."""
_WORKING_DIRECTORY = PurePosixPath("/workspace")
"""Of the image."""


@dataclass(frozen=True)
class Job:
    """A checked wish. `nproc` processes on each of at most `nodes` nodes, at least `min_nodes` of them."""

    target: str
    config: RunConfig
    path: Path
    overrides: tuple[str, ...]
    nproc: int
    wishes: Wishes
    exclude: tuple[str, ...] = field(default=())

    @property
    def nodes(self) -> int:
        return self.wishes.nodes

    @property
    def min_nodes(self) -> int:
        return self.wishes.min_nodes or self.nodes

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def gpus(self) -> bool:
        """Whether nodes are asked for GPUs: unless the config says `device = "cpu"`."""
        return self.config.device != "cpu"

    @property
    def stop_seconds(self) -> int:
        """How long a run that is asked to stop may take: its checkpoint must be written by then."""
        return round(self.config.resilience.stop_before_limit_seconds)

    @property
    def cpus_per_process(self) -> int:
        return self.wishes.cpus or (4 if self.gpus else 1)

    @property
    def volume_run_dir(self) -> str:
        """The run folder where runs lie on a volume."""
        return self.config.run.dir or str(VOLUMES[self.target] / self.name)

    @property
    def env(self) -> list[tuple[str, str]]:
        return [(name, value) for name, _, value in (one.partition("=") for one in self.wishes.env)]


def check_job(target: str, path: Path, overrides: Sequence[str], wishes: Wishes) -> Job:
    """Read the config and see whether its mesh and batches fit the nodes; UserError with all problems at once."""
    problems = wish_problems(target, wishes)
    try:
        config = load_config(path, list(overrides), check_layout=False).config
    except UserError as error:
        raise UserError([*problems, *error.problems]) from None
    nproc = wishes.nproc or config.train.nproc
    if nproc is None:
        problems.append("--nproc: processes on each node, one per GPU; say how many (or set train.nproc)")
    elif not problems:
        problems += _layout_problems(config, wishes, nproc)
    if target == "accelerate" and config.device == "cpu":
        problems.append(
            'device = "cpu": accelerate starts one process on a machine without GPUs; use --target torchrun'
        )
    problems += _time_problems(config, wishes)
    excluded, unknown = excluded_nodes(target, wishes.exclude)
    problems += [*unknown, *_volume_problems(target, config)]
    if problems or nproc is None:
        raise UserError(problems)
    return Job(target, config, path, tuple(overrides), nproc, wishes, excluded)


def _layout_problems(config: RunConfig, wishes: Wishes, nproc: int) -> list[str]:
    """For every number of nodes that the run may come to have: an elastic run must not end because it lost one."""
    problems = []
    for nodes in range(wishes.min_nodes or wishes.nodes, wishes.nodes + 1):
        product = f"{nodes} {'node' if nodes == 1 else 'nodes'} x {nproc} processes = {nodes * nproc}"
        fewer = " (--min-nodes allows it)" if nodes < wishes.nodes else ""
        # "start N processes (--nproc N)" is what `train` would be told: here both factors are free.
        problems += [
            f"{product}{fewer}: {re.sub(r' [(]--nproc [0-9]+[)]', ' in all', problem)}"
            for problem in layout_problems(config, nodes * nproc)
        ]
    return problems


def _volume_problems(target: str, config: RunConfig) -> list[str]:
    """Whatever lies beside the volume is gone with the pod, or its machine."""
    volume, folder = VOLUMES.get(target), config.run.dir
    if volume is None or folder is None:
        return []
    if target in KUBERNETES and (_WORKING_DIRECTORY / folder).is_relative_to(volume):
        return []
    if PurePosixPath(folder).is_relative_to(volume):
        return []
    return [
        f"run.dir = {folder}: for {target} runs must lie on the volume, which is at {volume}; set run.dir to a folder "
        "below that, or leave it out"
    ]


def _time_problems(config: RunConfig, wishes: Wishes) -> list[str]:
    """Slurm's signal may come a minute early: in a short job it would come before the first step."""
    if not wishes.time or not re.fullmatch(TIME, wishes.time):
        return []
    stop = round(config.resilience.stop_before_limit_seconds)
    seconds, least = _seconds(wishes.time), stop + SIGNAL_SECONDS + 120
    if seconds >= least:
        return []
    return [
        f"--time {wishes.time} is {seconds} s: the run is asked to stop {stop} + {SIGNAL_SECONDS} s before that, and "
        f"Slurm may do so a minute early; give it {-(-least // 60)} minutes, or lower "
        "resilience.stop_before_limit_seconds"
    ]


def _seconds(time: str) -> int:
    """Of a time limit as Slurm writes it: with days the first number behind them is hours, else two are minutes."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts]}.get(len(parts), parts)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
