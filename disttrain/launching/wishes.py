"""What the command line says beside the config, and what of it makes no sense for a target. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SLURM = ("slurm", "slurm-native")
KUBERNETES = ("k8s-trainjob", "k8s-pytorchjob", "k8s-jobset", "k8s-job")
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

TIME = r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}"
"""A time limit as Slurm writes it."""
_MEMORY = {
    **dict.fromkeys(SLURM, (r"\d+[KMGT]?", "Slurm reads a whole number with K, M, G or T behind it, such as 64G")),
    **dict.fromkeys(
        KUBERNETES,
        (r"\d+(\.\d+)?([KMGT]i|[kMGT])?", "Kubernetes reads a number with Mi, Gi or Ti behind it, such as 64Gi"),
    ),
}
_HOST = r"[\w.:-]+"
"""What torch takes for the head: a name, an IPv4 or an IPv6 address."""
_NODE = {**dict.fromkeys(SLURM, r"[\w.,\[\]-]+"), **dict.fromkeys((*KUBERNETES, "deepspeed"), r"[\w.-]+")}
_WORDS = ("account", "partition", "qos", "container", "image", "claim")
_LINES = ("modules", "sbatch", "setup", "accelerators")


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


def wish_problems(target: str, wishes: Wishes) -> list[str]:
    """In words; empty where all of it makes sense."""
    return [
        *(
            f"{_option(name)}: {target} has no use for it; it is for {', '.join(targets)}"
            for name, targets in _FOR.items()
            if getattr(wishes, name) not in (None, "", ()) and target not in targets
        ),
        *_number_problems(target, wishes),
        *_text_problems(target, wishes),
    ]


def _number_problems(target: str, wishes: Wishes) -> list[str]:
    problems = []
    if wishes.nodes < 1 or (wishes.nproc is not None and wishes.nproc < 1):
        problems.append(f"--nodes {wishes.nodes} --nproc {wishes.nproc}: both must be at least 1")
    if target == "local" and wishes.nodes != 1:
        problems.append(f"--nodes {wishes.nodes}: local is this machine; use --target torchrun for several")
    if wishes.min_nodes is not None and not 1 <= wishes.min_nodes <= wishes.nodes:
        problems.append(f"--min-nodes {wishes.min_nodes}: must be between 1 and --nodes, which is {wishes.nodes}")
    if wishes.cpus is not None and wishes.cpus < 1:
        problems.append(f"--cpus {wishes.cpus}: each process needs at least 1")
    alone = {"torchrun": wishes.head and "--head", "deepspeed": wishes.exclude and "--exclude"}
    if wishes.nodes == 1 and (option := alone.get(target)):
        problems.append(f"{option}: {target} has no use for it on one node, this machine; --nodes N for several")
    return problems


def _text_problems(target: str, wishes: Wishes) -> list[str]:
    """What would break the script or manifest, or mean something else there."""
    problems = []
    if wishes.time and not re.fullmatch(TIME, wishes.time):
        problems.append(
            f"--time {wishes.time!r}: Slurm reads MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS or "
            "DAYS-HOURS:MINUTES:SECONDS"
        )
    pattern, words = _MEMORY.get(target, ("", ""))
    if wishes.memory and pattern and not re.fullmatch(pattern, wishes.memory):
        problems.append(f"--memory {wishes.memory!r}: {words}")
    if wishes.head and not re.fullmatch(_HOST, wishes.head):
        problems.append(f"--head {wishes.head!r}: must be a host's name or address")
    problems += [
        f"--env {one!r}: must be NAME=VALUE" for one in wishes.env if not re.fullmatch(r"[A-Za-z_]\w*=.*", one)
    ]
    words_of = {name: value for name in _WORDS if (value := getattr(wishes, name))}
    problems += [f"--{name} {value!r}: must be one word" for name, value in words_of.items() if re.search(r"\s", value)]
    lines = [(name, one) for name in _LINES for one in _several(getattr(wishes, name))]
    problems += [
        f"{_option(name)} {one!r}: must be one line, and not empty"
        for name, one in lines
        if not one.strip() or "\n" in one
    ]
    return problems + [
        f"--sbatch {one!r}: an option of sbatch begins with -" for one in wishes.sbatch if not one.startswith("-")
    ]


def _several(value: str | Sequence[str]) -> list[str]:
    return ([value] if value else []) if isinstance(value, str) else list(value)


def _option(name: str) -> str:
    singular = {"modules": "module"}.get(name, name)
    return f"--{singular.replace('_', '-')}"


def excluded_nodes(target: str, wanted: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Names of nodes, from files with one a line (what follows the name is a reason) or as given; and what is wrong."""
    names: list[str] = []
    problems = []
    for one in wanted:
        if Path(one).is_file():
            lines = [line.partition("#")[0].split() for line in Path(one).read_text(encoding="utf-8").splitlines()]
            names += [words[0] for words in lines if words]
        elif "/" in one or one.endswith(".txt"):
            problems.append(
                f"--exclude {one}: there is no such file; name nodes with commas, or a file with one a line"
            )
        else:
            # Not at the commas inside of n[3,7], which Slurm writes.
            names += [name for name in re.split(r",(?![^\[]*\])", one) if name]
    problems += [
        f"--exclude {name!r}: is no name of a node for {target}"
        for name in names
        if not re.fullmatch(_NODE.get(target, ".*"), name)
    ]
    return tuple(dict.fromkeys(names)), problems
