"""Who this process is and what the machine shows, by variables and files that the tests make up."""

from pathlib import Path

import pytest

from disttrain.distributed.env import Ranks, read_ranks, read_variables, usable_cores, visible_gpus
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
    ],
)
def test_half_a_launcher_is_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_ranks(variables)


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
