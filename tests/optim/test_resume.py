"""Every optimizer, resumed in the middle at another world size and strategy, ends where one process ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.checkpoint.reading import open_checkpoint
from disttrain.config.parallel import ParallelConfig
from disttrain.testing import RankPool
from disttrain.testing.optimizer_parity import LR_FACTORS, STRATEGIES, Toys, tensor_error
from tests.optim.resume_jobs import HALF, Run, cases, whole

JOBS = "tests.optim.resume_jobs:"
TOLERANCE = 1e-12
PAIRS = [("fsdp", 4, "ddp", 2), ("hsdp", 4, "fsdp", 3), ("ddp", 2, "hsdp", 4)]


@pytest.mark.parametrize(("first", "world", "second", "other_world"), PAIRS)
def test_the_same_trajectory_on_another_layout(
    pool: RankPool, first: str, world: int, second: str, other_world: int, tmp_path: Path
) -> None:
    pool.run(JOBS + "save", world, 100, settings=STRATEGIES[first], directory=tmp_path)
    resumed = pool.run(JOBS + "resume", other_world, 100, settings=STRATEGIES[second], directory=tmp_path)[0]
    for name, optim in cases().items():
        alone = Run(1, STRATEGIES["ddp"], optim)
        alone.train(range(len(LR_FACTORS)))
        for seen, expected in zip(resumed[name], alone.weights(), strict=True):
            errors = {tensor: tensor_error(tensor, seen[tensor], weight) for tensor, weight in expected.items()}
            assert max(errors.values()) < TOLERANCE, (name, errors)


def test_a_checkpoint_holds_the_weights_to_use_and_those_to_train(pool: RankPool, tmp_path: Path) -> None:
    """Whoever reads only `model.*` (generate, evaluate, export, init_from) has the average of Schedule-Free."""
    settings: dict[str, Any] = STRATEGIES["fsdp"]
    training, used = pool.run(JOBS + "save", 2, 100, settings=settings, directory=tmp_path)[0]["schedule_free_adamw"]
    reader, found = open_checkpoint(tmp_path / "schedule_free_adamw" / f"step-{HALF:08d}")
    toys = Toys(1, torch.device("cpu"), ParallelConfig(strategy="ddp"))
    reader.load_weights(toys, found)
    assert all(torch.equal(used[name], weight) for name, weight in whole(toys).items())
    assert not torch.equal(training["square"], used["square"])
