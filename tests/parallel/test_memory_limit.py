"""A model that is larger than one process may be trains on four."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.testing import JobError, RankPool
from disttrain.train.build import build_gpt, build_model
from disttrain.train.step import train_step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts heap and anonymous maps as data")

JOB = "tests.parallel.test_memory_limit:train_within"
CPU = torch.device("cpu")
LENGTH = 16
TOY = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=64)
LARGE = ModelConfig(n_layers=16, d_model=256, n_heads=4, vocab_size=64)
STATE_BYTES = 16 * sum(parameter.numel() for parameter in build_gpt(LARGE, LENGTH, torch.device("meta")).parameters())
"""Weights, gradients and two moments: 202 MB."""
ROOM_BYTES = 128 * 2**20
M_MMAP_THRESHOLD = -3
FSDP: dict[str, Any] = {"strategy": "fsdp"}
DDP: dict[str, Any] = {"strategy": "ddp"}


@pytest.fixture
def own_pool() -> Iterator[RankPool]:
    """Ranks that take their limit with them when the test ends."""
    with RankPool(4) as ranks:
        yield ranks


def train_within(rank: int, world: int, settings: dict[str, Any], room_bytes: int) -> list[float]:
    """Losses of two steps in a process that may grow by `room_bytes` from where torch and its threads left it."""
    # Else glibc keeps much of what was freed in its heap: up to four times what fsdp needs at once.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)
    _train(rank, world, settings, TOY)
    limit = _data_bytes() + room_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return _train(rank, world, settings, LARGE)


def _train(rank: int, world: int, settings: dict[str, Any], config: ModelConfig) -> list[float]:
    parallel = ParallelConfig(**settings)
    dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
    mesh = build_mesh(dims, "cpu")
    gpt, model = build_model(config, max_length=LENGTH, mesh=mesh, parallel=parallel, seed=0, device=CPU)
    optimizer = build_optimizer(gpt, OptimConfig(lr=1e-3), GPT_PLAN)
    engine = NativeEngine(gpt, model, optimizer, parallel=parallel, device=CPU)
    tokens = torch.randint(64, (1, LENGTH), generator=torch.Generator().manual_seed(rank))
    steps = [train_step(engine, [(tokens, tokens.roll(-1, 1))], lr_factor=1.0, device=CPU) for _ in range(2)]
    return [step.loss_sum.item() for step in steps]


def _data_bytes() -> int:
    """What RLIMIT_DATA is held against: private writable memory, touched or not."""
    found = re.search(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def test_four_ranks_train_what_does_not_fit_one(own_pool: RankPool) -> None:
    assert STATE_BYTES > 1.4 * ROOM_BYTES
    for first, second in own_pool.run(JOB, 4, settings=FSDP, room_bytes=ROOM_BYTES):
        assert second < first


@pytest.mark.parametrize(("settings", "world"), [(FSDP, 1), (DDP, 1), (DDP, 2)], ids=["fsdp1", "ddp1", "ddp2"])
def test_one_process_has_no_room_for_it(own_pool: RankPool, settings: dict[str, Any], world: int) -> None:
    with pytest.raises(JobError, match="allocate memory"):
        own_pool.run(JOB, world, settings=settings, room_bytes=ROOM_BYTES)


def test_it_is_the_limit_that_stops_it(own_pool: RankPool) -> None:
    [[first, second]] = own_pool.run(JOB, 1, settings=DDP, room_bytes=3 * ROOM_BYTES)
    assert second < first
