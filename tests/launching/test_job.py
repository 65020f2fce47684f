"""What is refused before anything is written, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.errors import UserError
from disttrain.launching.job import Job, _seconds, check_job
from disttrain.launching.wishes import TARGETS, Wishes
from tests.launching.rendered import ROOT


def checked(target: str, *overrides: str, **wishes: object) -> Job:
    wanted = Wishes(**{"nodes": 2, "nproc": 2} | wishes)  # type: ignore[arg-type]
    return check_job(target, ROOT / "configs/quickstart.toml", overrides, wanted)


def problems(target: str, *overrides: str, **wishes: object) -> list[str]:
    with pytest.raises(UserError) as caught:
        checked(target, *overrides, **wishes)
    return list(caught.value.problems)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_taken(target: str) -> None:
    job = checked(target, nodes=1)
    assert (job.nodes, job.min_nodes, job.nproc, job.name) == (1, 1, 2, "quickstart")


def test_processes_come_from_the_config_unless_said() -> None:
    assert checked("slurm", nproc=None).nproc == 2
    path = ROOT / "configs/gpt3_125m.toml"
    with pytest.raises(UserError, match="--nproc: processes on each node, one per GPU"):
        check_job("slurm", path, (), Wishes(nodes=2))


def test_a_mesh_that_does_not_fit_shows_the_arithmetic() -> None:
    (problem,) = problems("slurm", 'parallel.strategy="hsdp"', "parallel.dp_shard=4", "parallel.dp_replicate=2")
    assert problem.startswith(
        "2 nodes x 2 processes = 4: the mesh dp_replicate 2 x dp_shard 4 = 8 processes, but there are 4"
    )
    assert "start 8 processes in all" in problem


def test_a_batch_that_does_not_divide() -> None:
    (problem,) = problems("torchrun", nodes=3)
    assert problem.startswith("3 nodes x 2 processes = 6: train.global_batch_tokens = 2048 is not a multiple of")
    assert "nearest: 1536 or 3072" in problem


def test_an_elastic_job_must_fit_on_fewer_nodes_too() -> None:
    (problem,) = problems("torchrun", nodes=4, min_nodes=2)
    assert problem.startswith("3 nodes x 2 processes = 6 (--min-nodes allows it): ")


def test_all_problems_come_at_once() -> None:
    found = problems("k8s-jobset", "optim.lrr=3", account="lab", env=["1X=2"], min_nodes=5, nodes=2)
    assert [problem.partition(":")[0] for problem in found] == [
        "--account",
        "--min-nodes",
        "--min-nodes 5",
        "--env '1X=2'",
        "override 'optim.lrr=3'",
    ]


@pytest.mark.parametrize(
    ("target", "wishes", "said"),
    [
        ("local", {"nodes": 2}, "--nodes 2: local is this machine; use --target torchrun for several"),
        ("slurm", {"nodes": 0}, "both must be at least 1"),
        ("slurm", {"time": "soon"}, "--time 'soon': Slurm reads MINUTES"),
        ("slurm", {"sbatch": ["exclusive"]}, "--sbatch 'exclusive': an option of sbatch begins with -"),
        ("slurm", {"partition": "a b"}, "--partition 'a b': must be one word"),
        ("slurm", {"exclude": ["failing_nodes.txt"]}, "--exclude failing_nodes.txt: there is no such file"),
        (
            "skypilot",
            {"min_nodes": 1},
            "--min-nodes: skypilot has no use for it; it is for torchrun, slurm, k8s-pytorchjob",
        ),
        ("torchrun", {"modules": ["cuda"]}, "--module: torchrun has no use for it"),
        ("torchrun", {"head": "h", "nodes": 1}, "--head: torchrun has no use for it on one node"),
        ("deepspeed", {"exclude": ["n3"], "nodes": 1}, "--exclude: deepspeed has no use for it on one node"),
        ("torchrun", {"head": "x}; echo hi"}, "--head 'x}; echo hi': must be a host's name or address"),
        ("slurm", {"memory": "64 G"}, "--memory '64 G': Slurm reads a whole number with K, M, G or T behind it"),
        ("k8s-jobset", {"memory": "64GB"}, "--memory '64GB': Kubernetes reads a number with Mi, Gi or Ti behind it"),
        ("slurm", {"sbatch": ["--x\n--y"]}, "--sbatch '--x\\n--y': must be one line, and not empty"),
        ("slurm", {"modules": [""]}, "--module '': must be one line, and not empty"),
        ("skypilot", {"claim": "a b"}, "--claim 'a b': must be one word"),
        ("slurm", {"exclude": ["a b"]}, "--exclude 'a b': is no name of a node for slurm"),
        ("k8s-jobset", {"exclude": ["n[1-3]"]}, "--exclude 'n[1-3]': is no name of a node for k8s-jobset"),
    ],
)
def test_wishes_that_make_no_sense(target: str, wishes: dict[str, object], said: str) -> None:
    (problem,) = problems(target, **wishes)
    assert said in problem


def test_each_process_needs_a_core() -> None:
    assert problems("slurm", cpus=0) == ["--cpus 0: each process needs at least 1"]


@pytest.mark.parametrize(("target", "volume"), [("k8s-jobset", "/workspace/runs"), ("skypilot", "/runs")])
def test_a_run_folder_beside_the_volume_would_be_lost(target: str, volume: str) -> None:
    """It used to be left out in silence, for the one on the volume."""
    (problem,) = problems(target, 'run.dir="/data/x"')
    assert problem.startswith(f"run.dir = /data/x: for {target} runs must lie on the volume, which is at {volume}")
    assert checked(target, f'run.dir="{volume}/x"').volume_run_dir == f"{volume}/x"
    assert checked(target).volume_run_dir == f"{volume}/quickstart"


def test_accelerate_needs_gpus() -> None:
    (problem,) = problems("accelerate", 'device="cpu"')
    assert "accelerate starts one process on a machine without GPUs; use --target torchrun" in problem


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("12:00:10", 43210),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("2-00:00:00", 172_800),
    ],
)
def test_times_that_slurm_reads(time: str, seconds: int) -> None:
    assert checked("slurm", time=time).wishes.time == time
    assert _seconds(time) == seconds


def test_a_job_that_would_be_asked_to_stop_at_once() -> None:
    (problem,) = problems("slurm-native", time="4")
    assert problem.startswith("--time 4 is 240 s: the run is asked to stop 120 + 60 s before that")
    assert "give it 5 minutes, or lower resilience.stop_before_limit_seconds" in problem


def test_nodes_to_leave_out(tmp_path: Path) -> None:
    file = tmp_path / "failing_nodes.txt"
    file.write_text("n3 disk is full\n\n# seen twice\nn4  # clock\nn3\n")
    assert checked("slurm", exclude=[str(file), "n7,n4"]).exclude == ("n3", "n4", "n7")
    assert checked("slurm", exclude=["n[1,2],m[1,2]"]).exclude == ("n[1,2]", "m[1,2]")
