"""Jobs of test_pool.py, importable in a worker."""

import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader


def rank_sum(rank: int, world: int) -> tuple[int, float]:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return rank, total.item()


def scaled(rank: int, world: int, tensor: Tensor, factors: dict[str, Tensor]) -> Tensor:
    return tensor * factors["by"] * rank


def threads_and_pid(rank: int, world: int) -> tuple[int, int]:
    return torch.get_num_threads(), os.getpid()


def leave_state(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.rand(3)
    os.environ["RANK"] = "left over"


def see_state(rank: int, world: int) -> tuple[str, float, str | None]:
    return str(torch.get_default_dtype()), torch.rand(()).item(), os.environ.get("RANK")


def load_data(rank: int, world: int) -> float:
    return sum(batch.sum().item() for batch in DataLoader(range(10), batch_size=4, num_workers=1))  # type: ignore[arg-type]


def return_early(rank: int, world: int) -> None:
    """Rank 0 has sent its part and is done long before rank 1 receives it."""
    if rank == 0:
        dist.send(torch.ones(1_000), 1)
    else:
        time.sleep(0.3)
        dist.recv(torch.empty(1_000), 0)


def end_group(rank: int, world: int) -> None:
    dist.barrier()
    dist.destroy_process_group()


def raise_before_collective(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("bad input before the collective")
    dist.all_reduce(torch.ones(3))


def raise_between_collectives(rank: int, world: int) -> None:
    dist.all_reduce(torch.ones(3))
    if rank == 1:
        raise ValueError("bad input between the collectives")
    dist.all_reduce(torch.ones(1_000_000))


def raise_in_fsdp_forward(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if rank == 1:
        model[0].register_forward_hook(_raise_in_hook)
    model(torch.ones(2, 16)).sum().backward()


def _raise_in_hook(*unused: object) -> None:
    raise ValueError("bad input in the forward")


def raise_everywhere(rank: int, world: int) -> None:
    time.sleep(0.05 * (world - rank))
    raise ValueError(f"bad input on rank {rank}")


def hang(rank: int, world: int) -> None:
    if rank == 1:
        _sleep_for_long()
    print("rank 0 waits")
    dist.all_reduce(torch.ones(3))


def _sleep_for_long() -> None:
    time.sleep(600)


def die(rank: int, world: int) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(3))


def leave(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(7)


def leave_with_child(rank: int, world: int, seconds: float) -> None:
    """The child inherits the worker's pipe, so the pipe stays open when the worker dies."""
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"], close_fds=False)
    leave(rank, world)


def return_function(rank: int, world: int) -> object:
    return lambda: rank


def return_group(rank: int, world: int) -> object:
    return dist.group.WORLD
