"""All facts of this node, in about a second and without torch."""

from __future__ import annotations

import secrets
import socket
import time
from urllib.parse import urlsplit

from disttrain.config.monitor import MonitorConfig
from disttrain.distributed.env import read_variables
from disttrain.doctor.facts import Node, Package
from disttrain.doctor.machine import gather_disk, gather_limits, gather_shared_memory
from disttrain.doctor.needs import Needs
from disttrain.doctor.network import gather_network
from disttrain.doctor.nvidia import gather_gpus
from disttrain.doctor.reach import tcp_problem
from disttrain.doctor.versions import gather_versions
from disttrain.errors import UserError
from disttrain.train.extras import check_extras

WANDB_SECONDS = 5.0
WANDB_HOST = "https://api.wandb.ai"


def host_name() -> str:
    """What `sbatch --exclude` calls this node; elsewhere what the machine calls itself."""
    return read_variables(["SLURMD_NODENAME"]).get("SLURMD_NODENAME") or socket.gethostname()


def gather_node(needs: Needs, head_is_open: bool = False) -> Node:
    gpus = gather_gpus()
    versions = gather_versions() | ({"driver": gpus.driver} if gpus.driver else {})
    return Node(
        host=host_name(),
        nonce=secrets.token_hex(8),
        unix_seconds=time.time(),
        versions=versions,
        network=gather_network(needs.head, needs.port, needs.hosts, head_is_open),
        limits=gather_limits(),
        shared_memory=gather_shared_memory(),
        disk=gather_disk(needs.folder),
        gpus=gpus,
        packages=gather_packages(needs.config.monitor) if needs.config else Package(),
    )


def gather_packages(monitor: MonitorConfig) -> Package:
    problems: tuple[str, ...] = ()
    try:
        check_extras(monitor)
    except UserError as error:
        problems = error.problems
    if monitor.wandb.mode != "online":
        return Package(problems=problems)
    url = urlsplit(read_variables(["WANDB_BASE_URL"]).get("WANDB_BASE_URL", WANDB_HOST))
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    return Package(problems=problems, wandb_server=f"{host}:{port}", wandb_error=tcp_problem(host, port, WANDB_SECONDS))
