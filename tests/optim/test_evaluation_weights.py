"""An evaluation sees the weights to use and leaves no trace; and what an update sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disttrain.testing import RankPool
from disttrain.testing.matrix_parity import CASES
from disttrain.testing.optimizer_parity import STRATEGIES

JOBS = "tests.optim.evaluation_jobs:"


@pytest.mark.parametrize("name", ["ddp", "zero1", "fsdp"])
def test_an_evaluation_uses_the_average_and_changes_no_bit(pool: RankPool, name: str) -> None:
    """zero1 keeps gathered weights after a forward: what is written to the shards must reach the next one."""
    job: dict[str, Any] = {"settings": STRATEGIES[name]}
    blind = pool.run(JOBS + "trained_and_looked_at", 2, **job, looks=False)[0]
    for looked in pool.run(JOBS + "trained_and_looked_at", 2, **job, looks=True):
        assert looked["loss"] == pytest.approx(looked["by_hand"], rel=1e-13)
        assert abs(looked["at_training_weights"] / looked["by_hand"] - 1) > 1e-6
        assert all(torch.equal(weight, blind["weights"][key]) for key, weight in looked["weights"].items())


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp"])
def test_element_wise_updates_send_nothing_and_the_others_twice(pool: RankPool, name: str) -> None:
    """Matrices travel to their owners and back, whatever their number; where all is everywhere, owners broadcast."""
    counted = pool.run(JOBS + "collectives", 4, settings=STRATEGIES[name])[0]
    sharded = name != "ddp"
    expected: dict[str, dict[str, int]] = {case: {} for case in counted}
    expected["adafactor"] = {"all_reduce": 2} if sharded else {}
    expected |= {case: {"all_to_all": 2} if sharded else {} for case in (*CASES, "a user's function")}
    once = counted.pop("soap, computed once")
    assert counted == {case: calls for case, calls in expected.items() if case in counted}
    assert once.get("all_to_all", 0) == 2 * sharded
    assert once.get("broadcast", 0) == {"ddp": 4, "hsdp": 2}.get(name, 0)
