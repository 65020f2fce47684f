"""Metrics over calls and over ranks."""

import math

import pytest
import torch

from disttrain.monitor import Histogram, MetricBuffer
from disttrain.testing import RankPool


@pytest.mark.parametrize("world", [1, 2, 4])
def test_reductions_over_calls_and_ranks_in_one_collective(pool: RankPool, world: int) -> None:
    for (first, second, third), collectives in pool.run("tests.monitor.jobs:metrics", world):
        tokens = sum(1 + 2 + 3 + 3 * 10 * rank for rank in range(world))
        assert (first["tokens"], first["slowest"]) == (tokens, -1.0)  # the largest may be negative
        assert first["loss"] == pytest.approx(3 * world * torch.tensor(0.1).item(), rel=1e-15)  # added up in fp64
        assert first.by_rank("tokens") == [6.0 + 30 * rank for rank in range(world)]
        if world > 1:
            assert first["mean"] == 5.0  # ranks without tokens have no say
        assert math.isnan(third["mean"])
        assert (second["tokens"], second["loss"], second["slowest"]) == (0.0, 0.0, world - 1)
        assert third["slowest"] == -math.inf
        assert collectives == 1


@pytest.mark.parametrize("world", [1, 2])
def test_histograms(pool: RankPool, world: int) -> None:
    for (first, second, _), _ in pool.run("tests.monitor.jobs:metrics", world):
        edges = (1e-2, 1e-1, 1.0, 10.0, 100.0)
        # What lies outside is in the first and the last bin.
        assert first.histograms["times"].counts == (world, 2 * world, world, world)
        assert first.histograms["times"].edges == pytest.approx(edges)
        assert second.histograms["times"] == Histogram((), ())


@pytest.mark.parametrize("world", [1, 2])
def test_the_last_numbers_of_each_rank(pool: RankPool, world: int) -> None:
    for (first, second, third), _ in pool.run("tests.monitor.jobs:metrics", world):
        assert first.last("steps") == [[1.0, 11.0][:world], [2.0, 12.0][:world]]
        assert second.last("steps") == [[2.0, 1.0][:world], [3.0, 2.0][:world], [4.0, 3.0][:world]]
        assert third.last("steps") == []


def test_empty_ends_of_a_histogram_are_left_out() -> None:
    assert Histogram.trimmed([1, 2, 3, 4, 5], [0, 3, 0, 1]) == Histogram((2, 3, 4, 5), (3, 0, 1))


def test_a_name_that_was_not_declared() -> None:
    buffer = MetricBuffer({"loss": "sum"}, torch.device("cpu"))
    with pytest.raises(KeyError, match="lss"):
        buffer.add("lss", 1.0)


def test_a_nan_is_not_lost_in_a_maximum() -> None:
    for first, second in ((1.0, math.nan), (math.nan, 1.0)):
        buffer = MetricBuffer({"a": "max", "b": "max"}, torch.device("cpu"))
        for value in (first, second):
            buffer.add("a", torch.tensor(value))
            buffer.add("b", value)
        assert all(math.isnan(torch.as_tensor(held[0]).item()) for held in buffer._held.values())
