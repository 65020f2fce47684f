"""The device of this process and the process group of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from disttrain.distributed.arrival import meet
from disttrain.distributed.env import Ranks, usable_cores, visible_gpus
from disttrain.errors import UserError


def select_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda` made real. UserError for a GPU that is there (or wanted) but that torch cannot use."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"this machine runs process {local_rank + 1} but torch sees {count} GPUs: one process per GPU; "
                f"use --nproc {count}"
            )
        return torch.device("cuda", local_rank)
    seen = visible_gpus()
    if seen or wanted == "cuda":
        why = f"{seen} shows a GPU" if seen else 'device = "cuda"'
        raise UserError(
            f"{why}, but torch {torch.__version__} cannot use one: install a CUDA build that fits the driver "
            f'(nvidia-smi shows it), or say device="cpu" to train on the CPU'
        )
    return torch.device("cpu")


def default_processes(device: torch.device) -> int:
    """Processes to start on this machine when nobody said: one per GPU, or one."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


@contextmanager
def distributed(
    ranks: Ranks, device: torch.device, timeout_seconds: float, arrival_seconds: float | None = None
) -> Iterator[None]:
    """The process group of the run: nccl for CUDA tensors, gloo for CPU tensors (control messages of GPU runs too).

    `arrival_seconds` is how long to wait for ranks that have not come (default: `timeout_seconds`); LaunchError names
    them. A CPU rank computes with its share of the machine's cores. On an error the group is left alone: peers may be
    gone, and a teardown that waits for them would hide the error.
    """
    # torch's record of the last collectives, which tells who holds up the others when one hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, usable_cores() // ranks.local_world))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    alone = ranks.world == 1 and "MASTER_ADDR" not in os.environ
    store = dist.HashStore() if alone else meet(ranks, arrival_seconds or timeout_seconds)
    # Its own corner of the store, as torch does it: other groups count their keys from 0 too.
    store = dist.PrefixStore("default_pg", store)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout)
    yield
    dist.destroy_process_group()
