"""Every clipping policy under AdamW and Muon equals one process on every strategy, and mistakes show."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.config import OptimConfig
from disttrain.testing import RankPool
from disttrain.testing.clip_parity import MODEL, OPTIMIZERS, POLICIES, clip_optim
from disttrain.testing.optimizer_parity import STRATEGIES, TRAINING_TOLERANCE, trained_alone
from disttrain.testing.parity import tensor_error

JOB = "disttrain.testing.clip_parity:clip_job"


# `disttrain verify` has all strategies at both worlds; these keep the suite short.
@pytest.mark.parametrize(("name", "world"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
def test_every_policy_equals_one_process(pool: RankPool, name: str, world: int) -> None:
    errors = pool.run(JOB, world, 200, device="cpu", settings=STRATEGIES[name])[0]
    assert len(errors) == len(POLICIES) * len(OPTIMIZERS)
    assert {name: error for name, error in errors.items() if not error <= TRAINING_TOLERANCE} == {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_policy_acts(optimizer: str) -> None:
    unclipped = OptimConfig.model_validate({"groups": OPTIMIZERS[optimizer], "clip": {"kind": "none"}})
    without = trained_alone(unclipped.model_dump_json(), MODEL)
    for policy in POLICIES:
        weights = trained_alone(clip_optim(policy, optimizer).model_dump_json(), MODEL)
        assert max(tensor_error(name, weights[name], weight) for name, weight in without.items()) > 1e-3, policy


@pytest.mark.parametrize(
    ("mistake", "shows"),
    [("maxima stay local", "qk-clip"), ("biases are forgotten", "qk-clip"), ("a mean that drifts", "adaptive")],
)
def test_mistakes_turn_cells_red(pool: RankPool, mistake: str, shows: str) -> None:
    job: dict[str, Any] = {"mistake": mistake, "settings": STRATEGIES["ddp"]}
    errors = pool.run("tests.optim.clip_jobs:mistaken", 2, 100, **job)[0]
    red = {name for name, error in errors.items() if not error <= TRAINING_TOLERANCE}
    assert red == {name for name in errors if name.startswith((shows, "all ", *_also(shows)))}


def _also(shows: str) -> tuple[str, ...]:
    return ("zclip",) if shows == "adaptive" else ()
