"""A Slurm cluster on this machine: two virtual nodes on loopback, its daemons our own children, nothing left behind.

Needs root and the packages slurm-wlm and munge (Debian's names).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
START_SECONDS = 30.0
_PATH = "/usr/sbin:/sbin"
"""Where daemons lie, which is not on everybody's PATH."""


def missing_slurm() -> str:
    """Why there can be no virtual cluster here; empty where there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    search = f"{os.environ.get('PATH', '')}:{_PATH}"
    absent = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    return f"{', '.join(absent)} not installed (packages slurm-wlm and munge)" if absent else ""


@dataclass(frozen=True)
class VirtualCluster:
    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command of Slurm's, or anything else, with this cluster as its own."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says; empty for a job that is forgotten."""
        said = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)


@contextmanager
def virtual_cluster(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[VirtualCluster]:
    """A cluster whose state lies in `folder`, which must not be writable for others. Raises OSError when it does not
    come up."""
    folder.chmod(0o711)
    config = folder / "slurm.conf"
    config.write_text(_config(folder, nodes, cpus))
    (folder / "state").mkdir()
    environment = os.environ | {
        "SLURM_CONF": str(config),
        "PATH": f"{os.environ.get('PATH', '')}:{_PATH}",
        # The names of virtual nodes resolve nowhere.
        "MASTER_ADDR": "127.0.0.1",
    }
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    with ExitStack() as stack:
        # --force: a temporary folder may lie in one that others must not enter.
        files = [f"--{name}={folder / f'munge.{name}'}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        _daemon(stack, folder, environment, ["munged", "--foreground", "--force", f"--key-file={key}", *files])
        _daemon(stack, folder, environment, ["slurmctld", "-D"])
        for node in range(1, nodes + 1):
            _daemon(stack, folder, environment, ["slurmd", "-D", "-N", f"n{node}"])
        cluster = VirtualCluster(folder, environment)
        _wait_until_idle(cluster, nodes)
        try:
            yield cluster
        finally:
            _end_jobs(cluster)


def _config(folder: Path, nodes: int, cpus: int) -> str:
    host = socket.gethostname()
    ports = _free_ports(nodes + 1)
    lines = {
        "ClusterName": "virtual",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": str(ports[0]),
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        # A job that is requeued waits until its old credential is void: two minutes, unless this says less.
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "CredType": "cred/munge",
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "ReturnToService": "2",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "sched_interval=5,bf_interval=5",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool-%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
        "SlurmctldLogFile": f"{folder}/slurmctld.log",
        "SlurmdLogFile": f"{folder}/slurmd-%n.log",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "KillWait": "5",
    }
    text = "".join(f"{name}={value}\n" for name, value in lines.items())
    for node, port in enumerate(ports[1:], start=1):
        text += f"NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000\n"
    return f"{text}PartitionName=main Nodes=n[1-{nodes}] Default=YES State=UP\n"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _daemon(stack: ExitStack, folder: Path, environment: dict[str, str], command: Sequence[str]) -> None:
    """Start it in the foreground, as our child; it ends with the stack."""
    output = stack.enter_context((folder / f"{command[0]}.out").open("a"))
    daemon = subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    stack.callback(_end, daemon)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=15)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _end_jobs(cluster: VirtualCluster) -> None:
    """While the daemons live, which know the processes of their jobs."""
    cluster.run("scancel", "--full", "--signal=KILL", "--user=root")
    cluster.run("scancel", "--user=root")
    end = time.monotonic() + START_SECONDS
    while cluster.run("squeue", "--noheader").stdout.strip() and time.monotonic() < end:
        time.sleep(0.2)


def _wait_until_idle(cluster: VirtualCluster, nodes: int) -> None:
    end = time.monotonic() + START_SECONDS
    said = ""
    while time.monotonic() < end:
        said = cluster.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout
        if said.count(" idle") == nodes:
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text()[-500:] for path in cluster.folder.glob("*.out"))
    raise OSError(f"the virtual cluster did not come up: {said or 'slurmctld does not answer'}\n{logs}")
