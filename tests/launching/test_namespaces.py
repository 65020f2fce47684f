"""torchrun on two and three nodes, real but for the machine: `launch/multinode.sh` in network namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.helpers import (
    TRAIN,
    checkpoints,
    disttrain,
    environment,
    events,
    finish,
    losses,
    processes_of,
    rows,
    run,
    status,
    wait_for,
)
from tests.launching.namespaces import Node, cluster, needs_namespaces

pytestmark = [needs_namespaces, pytest.mark.timeout(120)]

IMPATIENT = {
    "PET_RDZV_CONF": "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2",
    "PET_MONITOR_INTERVAL": "0.1",
    # What each shell of a Slurm allocation says, wherever it is.
    "SLURM_PROCID": "0",
}
"""What torchrun takes for a lost node, and how often it looks: nobody here needs minutes."""
BATCH = "train.global_batch_tokens=384"
"""Twelve samples, for three nodes and for two."""
CORES = sorted(os.sched_getaffinity(0))
Started = subprocess.Popen[str]


def on_one_core(index: int = 0) -> tuple[object, ...]:
    """Bits depend on the number of threads, which is that of the cores."""
    return ("taskset", "-c", CORES[index % len(CORES)])


class Job:
    """The script for this config, and the processes that run it."""

    def __init__(self, stack: ExitStack, folder: Path, nodes: list[Node]) -> None:
        self.stack, self.folder, self.nodes = stack, folder / "run", nodes
        self.script = folder / "multinode.sh"
        self.agents: list[Started] = []

    def write(self, config: Path, *options: object, steps: int = 60) -> None:
        target = ("--target", "torchrun", "--nproc", 1, "--output", self.script)
        written = disttrain("launch", config, *target, *options, BATCH, f"train.steps={steps}")
        assert written.code == 0, written

    def start(self, index: int) -> Started:
        env = environment(
            HEAD=self.nodes[0].address, RUN_DIR=str(self.folder), PYTHON=sys.executable, **IMPATIENT, JOB_ID="one"
        )
        agent = self.stack.enter_context(self.nodes[index].started(*on_one_core(index), "bash", self.script, env=env))
        self.agents.append(agent)
        return agent

    def processes(self) -> list[str]:
        """What the run said of its starts."""
        return [event["text"] for event in events(self.folder) if event["kind"] in ("start", "resume")]

    def first_losses(self) -> dict[int, float]:
        return {step: loss for step, loss in losses(self.folder).items() if step <= 40}


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of 40 steps of two ranks on one machine."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = run(*on_one_core(), *TRAIN, config, "--nproc", 2, f"run.dir={folder}", BATCH)
    assert ended.code == 0, ended
    return losses(folder)


@pytest.fixture
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    with cluster(request.param) as nodes, ExitStack() as stack:
        yield Job(stack, tmp_path, nodes)
    assert processes_of(tmp_path) == []


def kill_after_a_checkpoint(job: Job, index: int) -> None:
    """The agent alone, as the kernel's out-of-memory killer may do: its rank must not go on."""
    agent = job.agents[index]
    wait_for(lambda: bool(checkpoints(job.folder)), agent)
    agent.kill()
    agent.wait()
    assert rows(job.folder)[-1]["step"] < 38, "too late to say anything"


@pytest.mark.parametrize("job", [2], indirect=True)
def test_a_node_is_killed_and_comes_back(job: Job, config: Path, undisturbed: dict[int, float]) -> None:
    """No bit of the losses differs from a run on one machine that nothing happened to."""
    job.write(config, "--nodes", 2)
    for index in range(2):
        job.start(index)
    kill_after_a_checkpoint(job, 1)
    job.start(1)
    assert [finish(job.agents[index]).code for index in (0, 2)] == [0, 0]
    assert status(job.folder) == {"state": "completed", "step": 60}
    assert [text[:11] for text in job.processes()] == ["2 processes"] * 2
    assert job.first_losses() == undisturbed


@pytest.mark.parametrize("job", [2], indirect=True)
def test_a_slow_link_changes_no_bit(job: Job, config: Path, undisturbed: dict[int, float]) -> None:
    """Both directions carry a small part of what the machine's memory would."""
    for node in job.nodes:
        node.limit("20mbit")
    job.write(config, "--nodes", 2, steps=40)
    for index in range(2):
        job.start(index)
    assert [finish(agent).code for agent in job.agents] == [0, 0]
    assert min(node.held_back() for node in job.nodes) > 0
    assert losses(job.folder) == undisturbed


@pytest.mark.parametrize("job", [3], indirect=True)
def test_a_job_goes_on_with_the_nodes_left(job: Job, config: Path, undisturbed: dict[int, float]) -> None:
    job.write(config, "--nodes", 3, "--min-nodes", 2)
    for index in range(3):
        job.start(index)
    kill_after_a_checkpoint(job, 2)
    assert [finish(job.agents[index]).code for index in (0, 1)] == [0, 0]
    assert [text[:11] for text in job.processes()] == ["3 processes", "2 processes"]
    assert job.first_losses() == pytest.approx(undisturbed, rel=1e-6)


@pytest.mark.parametrize("job", [3], indirect=True)
def test_a_node_that_comes_later_is_taken_in(job: Job, config: Path) -> None:
    """The agents ask their ranks to stop, which save, and start them again with the new ones: no step is lost."""
    job.write(config, "--nodes", 3, "--min-nodes", 2, steps=100_000)
    for index in range(2):
        job.start(index)
    wait_for(lambda: bool(checkpoints(job.folder)), job.agents[0])
    job.start(2)
    wait_for(lambda: job.processes()[-1].startswith("3 processes"), job.agents[0])
    (job.folder / "STOP").touch()
    assert [finish(agent).code for agent in job.agents] == [0, 0, 0]
    seen = [(event["kind"], event["step"]) for event in events(job.folder) if event["kind"] in ("stop", "resume")]
    step = seen[0][1]
    assert seen[:2] == [("stop", step), ("resume", step)]


@pytest.mark.parametrize("job", [2], indirect=True)
def test_nodes_that_do_not_meet(job: Job, config: Path) -> None:
    """A missing node, an address where nothing is, no network, an interface that this node lacks: one line each."""
    job.write(config, "--nodes", 2)
    look = (sys.executable, "-m", "disttrain.launching.node", "--port", 20001, "--reach", 6)
    here = job.nodes[1]

    def said(*arguments: object) -> tuple[int, str]:
        ended = run(*here.command(*look, *arguments, "--", "true"))
        assert len(ended.err.splitlines()) == 1, ended
        return ended.code, ended.err

    head = job.nodes[0]
    alone = run(*head.command(*look, "--head", head.address, "--nodes", 2, "--wait", 1, "--", "true"))
    assert (alone.code, alone.err[:32]) == (1, "error: 1 of 2 nodes has not come")
    assert "; here is node-0: start them too" in alone.err
    code, line = said("--head", "10.77.0.99")
    assert (code, line.startswith("error: the head 10.77.0.99:20001 cannot be reached from node-1 (")) == (1, True)
    code, line = said("--head", "203.0.113.1")
    assert (code, line.startswith("error: node-1 has no route to 203.0.113.1 (")) == (1, True)
    assert "veth1 (10.77.0.2)" in line
    code, line = said("--head", job.nodes[0].address, "--interface", "veth0")
    assert (code, "--interface = veth0: on node-1 the interface veth0 is not there" in line) == (2, True)
