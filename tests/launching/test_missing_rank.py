"""Ranks of a launcher whose peers do not come, or whose port is taken, say so in words and end."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import Ended, environment, run, status

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rank(config: Path, folder: Path, **variables: str) -> Ended:
    command = (sys.executable, "-m", "disttrain", "train", config, f"run.dir={folder}")
    return run(*command, "resilience.arrival_timeout_seconds=1", env=environment(**variables))


def test_a_rank_that_never_arrives_is_named(config: Path, tmp_path: Path, port: int) -> None:
    """As srun starts ranks, with the head's address given, as where names do not resolve."""
    head = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ended = rank(config, tmp_path / "run", SLURM_PROCID="0", SLURM_NODEID="0", **SRUN, **head)
    assert ended.code == 1
    assert re.match(r"error: rank 1 \(node 1\) of 2 has not arrived after 1 s: look at their logs", ended.err), ended
    assert "Traceback" not in ended.err
    assert status(tmp_path / "run")["state"] == "failed"


def test_the_first_rank_never_arrives(config: Path, tmp_path: Path, port: int) -> None:
    head = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}
    ended = rank(config, tmp_path / "run", **head)
    assert ended.code == 1
    said = f"error: rank 1: rank 0 of 2 has not arrived: nobody listens at 127.0.0.1:{port} after 1 s"
    assert any(line.startswith(said) for line in ended.err.splitlines()), ended
    assert "Traceback" not in ended.err


def test_two_jobs_with_one_port(config: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        head = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0"}
        ended = rank(config, tmp_path / "run", **head)
    assert ended.code == 2
    said = f"error: rank 0 cannot listen at 127.0.0.1:{port}: the port is in use on {socket.gethostname()}"
    assert any(line.startswith(said) for line in ended.err.splitlines()), ended
    assert "Traceback" not in ended.err
