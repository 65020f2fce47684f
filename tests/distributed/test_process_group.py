"""The device of a process, the group of a run of one, meshes and small collectives."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from disttrain.distributed import process_group
from disttrain.distributed.env import Ranks
from disttrain.distributed.process_group import default_processes, distributed, select_device
from disttrain.errors import UserError
from disttrain.testing import RankPool

JOBS = "tests.distributed.jobs"
CPU = torch.device("cpu")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher's variables, and afterwards no group and as many threads as before."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    threads = torch.get_num_threads()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_an_error(wanted: str, no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "visible_gpus", lambda: "SLURM_JOB_GPUS=3")
    with pytest.raises(UserError) as refused:
        select_device(wanted)
    (problem,) = refused.value.problems
    assert problem.startswith(f"SLURM_JOB_GPUS=3 shows a GPU, but torch {torch.__version__} cannot use one")
    assert 'device="cpu"' in problem


def test_cuda_where_there_is_none(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "visible_gpus", lambda: None)
    assert select_device("auto") == CPU
    with pytest.raises(UserError, match='device = "cuda", but torch'):
        select_device("cuda")


def test_cpu_stays_cpu(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "visible_gpus", lambda: "SLURM_JOB_GPUS=3")
    assert select_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("cpu") == CPU


def test_one_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto", local_rank=1) == select_device("cuda", local_rank=1) == torch.device("cuda", 1)
    assert (default_processes(torch.device("cuda", 0)), default_processes(CPU)) == (2, 1)
    with pytest.raises(UserError, match=r"runs process 3 but torch sees 2 GPUs: .* --nproc 2"):
        select_device("auto", local_rank=2)


def test_a_run_of_one_needs_no_launcher(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "usable_cores", lambda: 7)
    with distributed(Ranks(local_world=3), CPU, timeout_seconds=30):
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        assert torch.get_num_threads() == 2  # 7 cores for 3 processes
        dist.all_reduce(torch.ones(1))
    assert not dist.is_initialized()


def test_an_error_does_not_wait_for_peers_that_may_be_gone(clean_process: None) -> None:
    with pytest.raises(ZeroDivisionError), distributed(Ranks(), CPU, timeout_seconds=30):
        _ = 1 / 0
    assert dist.is_initialized()


@pytest.mark.parametrize(("replicate", "shard"), [(1, 4), (4, 1), (2, 2)])
def test_the_axes_of_a_mesh(pool: RankPool, replicate: int, shard: int) -> None:
    for rank, axes in enumerate(pool.run(f"{JOBS}:mesh_axes", 4, replicate=replicate, shard=shard)):
        # Neighbours share a shard group: the slowest links carry the replicas.
        first = rank - rank % shard
        assert axes == {
            "dp_replicate": list(range(rank % shard, 4, shard)),
            "dp_shard": list(range(first, first + shard)),
        }


@pytest.mark.parametrize("world", [1, 3])
def test_integers_are_summed_exactly(pool: RankPool, world: int) -> None:
    """fp64 cannot hold the first sum, let alone fp32."""
    expected = [world * (2**53 + 1) + sum(range(world)), -world * 2**60, sum(range(world)), 0]
    assert pool.run(f"{JOBS}:sums", world) == [expected] * world


def test_rows_come_in_the_order_of_the_ranks(pool: RankPool) -> None:
    for rows in pool.run(f"{JOBS}:rows", 3):
        assert rows.tolist() == [[0, 0], [1, 1 / 3], [2, 2 / 3]]
