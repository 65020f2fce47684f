"""Metrics over calls and over ranks."""

import math

import pytest
import torch

from disttrain.monitor import MetricBuffer
from disttrain.testing import RankPool


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sums_and_maxima_over_calls_and_ranks_in_one_collective(pool: RankPool, world: int) -> None:
    for first, second, third, collectives in pool.run("tests.monitor.jobs:metrics", world):
        tokens = sum(1 + 2 + 3 + 3 * 10 * rank for rank in range(world))
        assert list(first) == ["tokens", "slowest", "loss"]
        assert (first["tokens"], first["slowest"]) == (tokens, -1.0)  # the largest may be negative
        assert first["loss"] == pytest.approx(3 * world * torch.tensor(0.1).item(), rel=1e-15)  # added up in fp64
        assert second == {"tokens": 0.0, "slowest": world - 1, "loss": 0.0}
        assert third == {"tokens": 0.0, "slowest": -math.inf, "loss": 0.0}
        assert collectives == 1


def test_a_name_that_was_not_declared() -> None:
    buffer = MetricBuffer({"loss": "sum"}, torch.device("cpu"))
    with pytest.raises(KeyError, match="lss"):
        buffer.add("lss", 1.0)
