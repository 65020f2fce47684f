"""Who this process is and what the machine shows, by variables and files that the tests make up."""

from pathlib import Path

import pytest

from disttrain.distributed.env import Ranks, first_host, read_ranks, read_variables, usable_cores, visible_gpus
from disttrain.errors import UserError


def test_torchrun_says_who_we_are() -> None:
    variables = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
    }
    assert read_ranks(variables) == Ranks(rank=5, world=8, local_rank=1, local_world=4, elastic=True)


def test_another_launcher_may_say_less() -> None:
    ranks = read_ranks({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"})
    assert ranks == Ranks(rank=1, world=2, local_rank=1, local_world=2, elastic=False)


@pytest.mark.parametrize("variables", [{}, {"LOCAL_RANK": "1"}])
def test_nobody_started_us(variables: dict[str, str]) -> None:
    assert read_ranks(variables) is None
    assert Ranks().is_first


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "3"}, "not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "b"}, "whole numbers"),
    ],
)
def test_half_a_launcher_is_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_ranks(variables)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "8"}, "RANK = 8, WORLD_SIZE = 8: the first must be from 0 to 7"),
        ({"RANK": "-1"}, "RANK = -1, WORLD_SIZE = 8: the first must be from 0 to 7"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK = 4, LOCAL_WORLD_SIZE = 4: the first must be from 0 to 3"),
        ({"LOCAL_WORLD_SIZE": "0"}, "WORLD_SIZE = 8, LOCAL_WORLD_SIZE = 0: all processes, and those of this machine"),
        ({"LOCAL_WORLD_SIZE": "9"}, "WORLD_SIZE = 8, LOCAL_WORLD_SIZE = 9: all processes, and those of this machine"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT = 99999: must be from 1 to 65535"),
    ],
)
def test_ranks_that_cannot_be(changed: dict[str, str], said: str) -> None:
    """Each of them once ended in a traceback, or in peers that waited ten minutes."""
    launcher = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(UserError) as caught:
        read_ranks(launcher | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | changed)
    (problem,) = caught.value.problems
    assert problem.startswith(said)


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"SLURM_JOB_GPUS": "2"}, "SLURM_JOB_GPUS=2"),
        ({"SLURM_STEP_GPUS": "0"}, "SLURM_STEP_GPUS=0"),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-abc"}, "NVIDIA_VISIBLE_DEVICES=GPU-abc"),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, None),  # images say so on machines without a GPU too
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, None),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_JOB_GPUS": "2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
    ],
)
def test_gpus_by_variables(tmp_path: Path, variables: dict[str, str], seen: str | None) -> None:
    assert visible_gpus(variables, tmp_path) == seen


def test_gpus_by_the_drivers_files(tmp_path: Path) -> None:
    folder = tmp_path / "proc/driver/nvidia/gpus"
    folder.mkdir(parents=True)
    assert visible_gpus({}, tmp_path) is None
    (folder / "0000:01:00.0").mkdir()
    assert visible_gpus({}, tmp_path) == str(folder)
    assert visible_gpus({"NVIDIA_VISIBLE_DEVICES": "all"}, tmp_path) == str(folder)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) is None


def test_there_is_a_core() -> None:
    assert usable_cores() >= 1


def test_variables_that_are_set_to_something() -> None:
    assert read_variables(["A", "B", "C"], {"A": "1", "B": "", "D": "2"}) == {"A": "1"}


SRUN = {
    "SLURM_JOB_ID": "10042",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_srun_says_who_we_are() -> None:
    expected = Ranks(rank=3, world=5, local_rank=1, local_world=2, ends_peers=True, head="gpu07", port=20043)
    assert read_ranks(SRUN) == expected
    given = read_ranks(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert given is not None
    assert (given.head, given.port) == ("10.0.0.1", 29500)
    last = read_ranks(SRUN | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})
    assert last is not None
    assert last.local_world == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": str(0xFFFF_FFFA)},  # the shell of salloc, as a step
        {"SLURM_STEP_ID": str(0xFFFF_FFFB)},  # the batch script
        {"SLURM_STEP_ID": ""},  # either of them, before Slurm numbered them
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun disttrain train --nproc 8
        {"SLURM_PTY_PORT": "40000"},  # srun --pty bash
    ],
)
def test_a_shell_inside_slurm_starts_its_own_ranks(changes: dict[str, str]) -> None:
    assert read_ranks(SRUN | changes) is None


def test_torchrun_inside_srun_goes_first() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert read_ranks(SRUN | torchrun) == Ranks(rank=0, world=2, local_world=2, elastic=True)


def test_deepspeed_says_who_we_are() -> None:
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
    variables |= {"CROSS_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_ranks(variables) == Ranks(rank=3, world=4, local_rank=1, local_world=2, ends_peers=True)


def test_a_broken_step_is_refused() -> None:
    with pytest.raises(UserError, match="a step of srun, whose variables are not what Slurm sets"):
        read_ranks(SRUN | {"SLURM_PROCID": "x"})
    for variable in ("SLURM_LOCALID", "SLURM_STEP_NODELIST"):
        with pytest.raises(UserError, match=f"'{variable}'"):
            read_ranks({name: value for name, value in SRUN.items() if name != variable})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("n[03-07,9]-ib,m1", "n03-ib"), ("a1,a2", "a1"), ("r2n[5,7]", "r2n5"), ("", "")],
)
def test_the_first_of_slurms_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
