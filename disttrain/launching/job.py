"""What shall be started where: the config, the mesh on these nodes, and what a cluster wants to know. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from disttrain.config import RunConfig
from disttrain.config.load import layout_problems, load_config
from disttrain.errors import UserError

SLURM = ("slurm", "slurm-native")
KUBERNETES = ("k8s-trainjob", "k8s-pytorchjob", "k8s-jobset")
TARGETS = ("local", "torchrun", *SLURM, *KUBERNETES, "skypilot", "deepspeed", "accelerate")
ELASTIC = ("torchrun", "slurm", "k8s-pytorchjob")
"""Where a run may go on with fewer nodes than it was given."""

_FOR = {
    **dict.fromkeys(("account", "partition", "qos", "time", "modules", "sbatch", "container"), SLURM),
    "setup": (*SLURM, "skypilot"),
    "env": (*SLURM, *KUBERNETES, "skypilot"),
    "exclude": (*SLURM, *KUBERNETES, "deepspeed"),
    "image": (*KUBERNETES, "skypilot"),
    "claim": (*KUBERNETES, "skypilot"),
    "accelerators": ("skypilot",),
    "cpus": (*SLURM, *KUBERNETES),
    "memory": (*SLURM, *KUBERNETES),
    "head": (*SLURM, "torchrun", "accelerate"),
    "min_nodes": ELASTIC,
}
"""Which targets know what to do with an option."""
SIGNAL_SECONDS = 60
"""How long before a run looks at the clock itself Slurm is asked to send its signal."""
_TIME = r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}"


@dataclass(frozen=True)
class Wishes:
    """What the command line says beside the config; empty where it says nothing."""

    nodes: int = 1
    nproc: int | None = None
    min_nodes: int | None = None
    head: str = ""
    account: str = ""
    partition: str = ""
    qos: str = ""
    time: str = ""
    container: str = ""
    modules: Sequence[str] = ()
    setup: Sequence[str] = ()
    sbatch: Sequence[str] = ()
    env: Sequence[str] = ()
    exclude: Sequence[str] = ()
    image: str = ""
    claim: str = ""
    accelerators: str = ""
    cpus: int | None = None
    memory: str = ""


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
    def env(self) -> list[tuple[str, str]]:
        return [(name, value) for name, _, value in (one.partition("=") for one in self.wishes.env)]


def check_job(target: str, path: Path, overrides: Sequence[str], wishes: Wishes) -> Job:
    """Read the config and see whether its mesh and batches fit the nodes; UserError with all problems at once."""
    problems = _wish_problems(target, wishes)
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
    excluded = _excluded(wishes.exclude, problems)
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


def _time_problems(config: RunConfig, wishes: Wishes) -> list[str]:
    """Slurm's signal may come a minute early: in a short job it would come before the first step."""
    if not wishes.time or not re.fullmatch(_TIME, wishes.time):
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


def _wish_problems(target: str, wishes: Wishes) -> list[str]:
    problems = [
        f"{_option(name)}: {target} has no use for it; it is for {', '.join(targets)}"
        for name, targets in _FOR.items()
        if getattr(wishes, name) and target not in targets
    ]
    if wishes.nodes < 1 or (wishes.nproc is not None and wishes.nproc < 1):
        problems.append(f"--nodes {wishes.nodes} --nproc {wishes.nproc}: both must be at least 1")
    if target == "local" and wishes.nodes != 1:
        problems.append(f"--nodes {wishes.nodes}: local is this machine; use --target torchrun for several")
    if wishes.min_nodes is not None and not 1 <= wishes.min_nodes <= wishes.nodes:
        problems.append(f"--min-nodes {wishes.min_nodes}: must be between 1 and --nodes, which is {wishes.nodes}")
    if wishes.time and not re.fullmatch(_TIME, wishes.time):
        problems.append(
            f"--time {wishes.time!r}: Slurm reads MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS or "
            "DAYS-HOURS:MINUTES:SECONDS"
        )
    problems += [
        f"--env {one!r}: must be NAME=VALUE" for one in wishes.env if not re.fullmatch(r"[A-Za-z_]\w*=.*", one)
    ]
    lines = {name: value for name in ("account", "partition", "qos", "container") if (value := getattr(wishes, name))}
    problems += [f"--{name} {value!r}: must be one word" for name, value in lines.items() if re.search(r"\s", value)]
    return problems + [
        f"--sbatch {one!r}: an option of sbatch begins with -" for one in wishes.sbatch if not one.startswith("-")
    ]


def _option(name: str) -> str:
    singular = {"modules": "module"}.get(name, name)
    return f"--{singular.replace('_', '-')}"


def _excluded(wanted: Sequence[str], problems: list[str]) -> tuple[str, ...]:
    """Names of nodes, from files with one a line (what follows the name is a reason) or as given."""
    names: list[str] = []
    for one in wanted:
        if Path(one).is_file():
            lines = [line.partition("#")[0].split() for line in Path(one).read_text(encoding="utf-8").splitlines()]
            names += [words[0] for words in lines if words]
        elif "/" in one or one.endswith(".txt"):
            problems.append(
                f"--exclude {one}: there is no such file; name nodes with commas, or a file with one a line"
            )
        else:
            names += [name for name in one.split(",") if name]
    return tuple(dict.fromkeys(names))
