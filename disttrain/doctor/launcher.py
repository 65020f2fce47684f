"""What a launcher or a scheduler says about this job. No torch: the head is called before seconds go into an import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from disttrain.errors import UserError

VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_NODES",
    "SLURM_JOB_NUM_NODES",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
)


@dataclass(frozen=True)
class Launch:
    """Where the launcher has its ranks meet."""

    host: str
    port: int
    agent_listens: bool
    """The elastic agent keeps the store; else the first rank does."""
    key: str
    """Keeps the words of another job, or of an earlier start, apart from ours."""


def read_launch(variables: Mapping[str, str]) -> Launch:
    """UserError for a port that is none."""
    job = [variables.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID")]
    return Launch(
        host=variables["MASTER_ADDR"],
        port=read_port(variables.get("MASTER_PORT", ""), "MASTER_PORT"),
        agent_listens=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        key="/".join(["doctor", *job, variables.get("TORCHELASTIC_RESTART_COUNT", "0")]),
    )


def read_port(text: str, name: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65_536:
        raise UserError(f"{name} {text}: must be a port number, 1 to 65535")
    return int(text)


def read_head(option: str | None, variables: Mapping[str, str]) -> tuple[str | None, int | None]:
    """`--head`, as HOST, HOST:PORT or [IPV6]:PORT, or what the launcher says; None where nobody does."""
    if option is None:
        if "MASTER_ADDR" not in variables:
            return None, None
        port = variables.get("MASTER_PORT")
        return variables["MASTER_ADDR"], read_port(port, "MASTER_PORT") if port else None
    if option.startswith("["):
        host, _, rest = option[1:].partition("]")
        port = rest.removeprefix(":")
    elif option.count(":") > 1:
        host, port = option, ""  # an IPv6 address without a port
    else:
        host, _, port = option.partition(":")
    if not host:
        raise UserError(f"--head {option}: names no host; write HOST or HOST:PORT")
    return host, read_port(port, "--head: port") if port else None


def read_nodes(option: int | None, hosts: list[str], variables: Mapping[str, str]) -> int | None:
    """How many nodes will come: `--nodes`, the hosts, or what Slurm says; None where nobody knows."""
    if option is not None and hosts and option != len(hosts):
        raise UserError(f"--nodes {option}, but --hosts names {len(hosts)}: leave one of them out")
    if option is not None or hosts:
        return option or len(hosts)
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES"):
        if variables.get(name, "").isdecimal():
            return int(variables[name])
    return None


def shared_folder(share: Path, variables: Mapping[str, str]) -> Path:
    """A folder of its own for each job, where the scheduler gives jobs a number."""
    job = variables.get("SLURM_JOB_ID")
    return share / f"job-{job}.{variables.get('SLURM_STEP_ID', '0')}" if job else share
