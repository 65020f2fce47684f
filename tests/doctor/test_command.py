"""`disttrain doctor` as a user runs it: alone, with ranks, under torchrun, with things broken on purpose."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import ROOT, TORCHRUN, Ended, disttrain, environment, finish, refused, run, started

STOPPED_RANK = """
import os, signal, psutil
from disttrain.doctor import local_ranks
real = local_ranks._rank_main
def stopped(rank, *rest):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    real(rank, *rest)
local_ranks._rank_main = stopped
results, missing = local_ranks.run_local_ranks(2, "cpu", "h", stall_seconds=2.0)
print(1 in missing, psutil.Process().children())
"""
CONFIG = ROOT / "configs" / "quickstart.toml"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which a list of failing nodes may appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(ended: Ended) -> dict[str, Any]:
    assert "Traceback" not in ended.err, ended
    return json.loads(ended.out)


def broken(found: dict[str, Any]) -> list[str]:
    return [finding["what"] for finding in found["findings"] if finding["severity"] == "breaks"]


def checks(found: dict[str, Any]) -> set[str]:
    return {finding["check"] for finding in found["findings"]}


def without_torch(tmp_path: Path) -> dict[str, str]:
    """A `torch` that ends the process when it is imported, and tells its version as the real one does."""
    package = tmp_path / "fake" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os\nos._exit(99)\n")
    (package / "version.py").write_text("__version__ = '2.13.0'\n")
    return environment(PYTHONPATH=f"{package.parent}{os.pathsep}{ROOT}")


def test_alone_and_without_torch(here: Path, tmp_path: Path) -> None:
    ended = disttrain("doctor", env=without_torch(tmp_path) | {"COLUMNS": "80"})
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-1].startswith("nothing here will break the run, ")
    assert all(len(line) <= 80 for line in ended.out.splitlines())
    assert "torch 2.13.0" in ended.out
    assert not (here / "failing_nodes.txt").exists()


def test_with_a_config_and_its_two_ranks(here: Path) -> None:
    found = answer(disttrain("doctor", CONFIG, "--json"))
    assert broken(found) == found["failing_nodes"] == []
    assert {"collectives", "links", "speed", "disk", "versions"} <= checks(found)
    assert [rank["rank"] for rank in found["facts"]["ranks"]] == [0, 1]
    assert all(rank["failed"] is None for rank in found["facts"]["ranks"])
    assert list(here.iterdir()) == []


def test_under_torchrun(here: Path) -> None:
    ended = run(*TORCHRUN, "-m", "disttrain", "doctor", "--json")
    found = answer(ended)
    assert ended.code == 0
    assert len(found["facts"]["ranks"]) == 2
    assert broken(found) == []


def test_few_open_files(here: Path) -> None:
    """The limit is really lowered; 2000 ranks of one node would need 128 + 8 x 2000."""
    command = f'ulimit -n 120; exec "{sys.executable}" -m disttrain doctor --json'
    done = subprocess.run(["sh", "-c", command], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert [what.split(" allowed")[0] for what in broken(found)] == ["open files: 120"]
    assert (here / "failing_nodes.txt").read_text() == f"{found['facts']['here']}\n"


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_an_interface_that_does_not_exist(here: Path, variable: str) -> None:
    ended = disttrain("doctor", env=environment(**{variable: "nosuch0"}))
    assert ended.code == 1
    assert f"{variable}=nosuch0: there is no such interface here; there are " in ended.out
    assert "will break the run" in ended.out


def test_a_head_whose_port_is_taken(here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = answer(disttrain("doctor", "--json", "--head", f"127.0.0.1:{taken.getsockname()[1]}"))
    assert broken(found) == [f"port {taken_port(found)} on the head cannot be opened: Address already in use"]


def taken_port(found: dict[str, Any]) -> int:
    return next(f["figures"]["port"] for f in found["findings"] if f["severity"] == "breaks")


def launched(rank: int, world: int, port: int, **more: str) -> dict[str, str]:
    return environment(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        **more,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_head_that_is_not_there_is_named_before_torch_is_imported(here: Path, tmp_path: Path) -> None:
    port = free_port()
    env = launched(1, 2, port) | {"PYTHONPATH": without_torch(tmp_path)["PYTHONPATH"]}
    ended = disttrain("doctor", "--json", "--wait", "0.5", env=env)
    assert ended.code == 1
    assert (
        f"the head 127.0.0.1:{port} does not answer: Connection refused (waited 1 s)" in broken(answer(ended))[-0:][0]
    )


def test_a_rank_that_never_arrives_is_named(here: Path) -> None:
    ended = disttrain("doctor", "--json", "--wait", "1", env=launched(0, 2, free_port()))
    assert ended.code == 1
    said = broken(answer(ended))
    assert any(what.startswith("node 2 of 2 did not come within 1 s") for what in said)
    assert "rank 1 gave no result: it never came" in said


def test_a_job_on_the_head_already(here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = disttrain("doctor", "--json", "--wait", "1", env=launched(0, 2, port))
    assert ended.code == 1
    assert f"port {port} on the head cannot be opened: Address already in use" in broken(answer(ended))


def test_nodes_that_share_a_folder(here: Path) -> None:
    """Two of Slurm's virtual nodes on one machine; the first one by name speaks about both."""
    share = here / "shared"
    command = (sys.executable, "-m", "disttrain", "doctor", "--json", "--share", share, "--hosts", "n1,n2")
    settings = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    first, second = (environment(SLURMD_NODENAME=name, **settings) for name in ("n1", "n2"))
    with started(*command, env=first) as one, started(*command, env=second) as two:
        found = [answer(finish(process)) for process in (one, two)]
    for each in found:
        # Where the machine's own name leads to the loopback, as on many, that is a finding between nodes.
        assert [what for what in broken(each) if "the host name" not in what] == []
        assert sorted(each["facts"]["nodes"]) == ["n1", "n2"]
        assert {"arrival", "clock", "reach"} <= checks(each)
    assert (share / "job-7.0").is_dir()  # what another job leaves cannot be mistaken for this one's


def step_of_srun(rank: int, tasks_per_node: str, **more: str) -> dict[str, str]:
    """What Slurm sets for a task, and nothing of the four variables of torchrun; the head's name is an address here."""
    local = rank if tasks_per_node == "2" else 0
    return environment(
        SLURM_JOB_ID="7",
        SLURM_STEP_ID="0",
        SLURM_STEP_NUM_TASKS="2",
        SLURM_STEP_NODELIST="127.0.0.1",
        SLURM_STEP_TASKS_PER_NODE=tasks_per_node,
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(local),
        SLURM_NODEID=str(rank - local),
        **more,
    )


def test_ranks_that_srun_has_started(here: Path) -> None:
    """They were taken for torchrun's, of which MASTER_ADDR was missing."""
    command = (sys.executable, "-m", "disttrain", "doctor", "--json")
    with started(*command, env=step_of_srun(0, "2")) as one, started(*command, env=step_of_srun(1, "2")) as two:
        first, second = finish(one), finish(two)
    assert (first.code, second.code, second.out) == (0, 0, "")
    assert [rank["rank"] for rank in answer(first)["facts"]["ranks"]] == [0, 1]


def test_one_task_of_srun_on_each_node_and_a_folder(here: Path) -> None:
    """The nodes compare each other without a rendezvous, as docs/doctor.md has it for Slurm."""
    command = (sys.executable, "-m", "disttrain", "doctor", "--json", "--share", here / "shared")
    own = {"SLURM_STEP_NUM_NODES": "2"}
    envs = [step_of_srun(rank, "1(x2)", SLURMD_NODENAME=f"n{rank + 1}", **own) for rank in (0, 1)]
    with started(*command, env=envs[0]) as one, started(*command, env=envs[1]) as two:
        found = [answer(finish(process)) for process in (one, two)]
    for each in found:
        assert sorted(each["facts"]["nodes"]) == ["n1", "n2"]
        assert {"arrival", "clock", "reach"} <= checks(each)


def test_a_node_that_does_not_come_is_left_out(here: Path) -> None:
    share = here / "shared"
    ended = disttrain("doctor", "--share", share, "--hosts", f"{socket.gethostname()},n2", "--wait", "0.5")
    assert ended.code == 1
    assert "n2 did not come within " in ended.out
    assert "n2" in (share / "failing_nodes.txt").read_text().splitlines()


def test_a_stopped_rank_does_not_hold_the_doctor_up(here: Path) -> None:
    """Rank 1 stops itself before it says a word; 2 s are enough here, in place of 25, to give up on it."""
    ended = run(sys.executable, "-c", STOPPED_RANK)
    assert (ended.code, ended.out) == (0, "True []\n"), ended


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc", "0"], "--nproc 0: there must be at least one"),
        (["--wait", "0"], "--wait 0: must be above 0"),
        (["--share", "s"], "--share s: how many nodes will come? Say --nodes N, or --hosts"),
        (["--hosts", "a,b,a", "--share", "s"], "--hosts a,b,a: a is there twice"),
        (["--hosts", "a,b", "--nodes", "3"], "--nodes 3, but --hosts names 2: leave one of them out"),
        (["--head", ":1"], "--head :1: names no host"),
        (["--head", "h:99999"], "--head: port 99999: must be a port number, 1 to 65535"),
        (["nosuch.toml"], "nosuch.toml"),
        ([CONFIG, "parallel.dp_shard=4", "--nodes", "3"], "but there are 6"),
        ([CONFIG, "trian.steps=1"], "trian.steps"),
        (["--share", "/proc/nowhere", "--nodes", "2"], "name a folder that all nodes can write to"),
    ],
)
def test_bad_input(here: Path, arguments: list[object], said: str) -> None:
    (line,) = refused(disttrain("doctor", *arguments))
    assert said in line


def test_half_a_launcher(here: Path) -> None:
    assert "not WORLD_SIZE" in refused(disttrain("doctor", env=environment(RANK="0")))[0]
    (line,) = refused(disttrain("doctor", "--nproc", 2, env=launched(0, 2, 29500)))
    assert "a launcher has started 1 processes here already" in line
