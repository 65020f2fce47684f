"""The two tables of optimizers and clippings against one process, and mistakes that they must show."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.testing import RankPool
from disttrain.testing.optimizer_parity import (
    ALGORITHMS,
    CLIPS,
    STRATEGIES,
    SYNTHETIC_TOLERANCE,
    TRAINING_TOLERANCE,
    WORLDS,
)

JOBS = "disttrain.testing.optimizer_parity:"
MUTATIONS = "tests.optim.parity_mutations:"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES)
def test_every_optimizer_on_drawn_gradients(pool: RankPool, settings: dict[str, Any], world: int) -> None:
    errors = pool.run(JOBS + "synthetic_job", world, 120, device="cpu", settings=settings)[0]
    assert set(errors) == set(ALGORITHMS)
    assert {name: error for name, error in errors.items() if not error <= SYNTHETIC_TOLERANCE} == {}


# `disttrain verify` has all strategies at both worlds; a pair at two ranks is enough to keep the suite short.
@pytest.mark.parametrize(("name", "world"), [*((name, 4) for name in STRATEGIES), ("ddp", 2), ("fsdp", 2)])
def test_every_optimizer_and_clipping_in_training(pool: RankPool, name: str, world: int) -> None:
    errors = pool.run(JOBS + "training_job", world, 200, device="cpu", settings=STRATEGIES[name])[0]
    assert len(errors) == len(ALGORITHMS) + len(CLIPS)
    assert {name: error for name, error in errors.items() if not error <= TRAINING_TOLERANCE} == {}


@pytest.mark.parametrize("mistake", ["a wrong hyperparameter", "a skipped shard", "sums that stay local"])
def test_mistakes_turn_cells_red(pool: RankPool, mistake: str) -> None:
    errors = pool.run(MUTATIONS + "spoilt", 2, mistake=mistake, settings=STRATEGIES["fsdp"])[0]
    red = {name for name, error in errors.items() if not error <= SYNTHETIC_TOLERANCE}
    assert red == ({"adafactor"} if mistake == "sums that stay local" else set(ALGORITHMS))
