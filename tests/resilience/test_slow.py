"""Who makes the others wait, from times with noise, hiccups and drifts."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.resilience.slow import SlowRanks, slow_ranks


def trace(
    rng: random.Random,
    steps: int,
    world: int,
    noise: float,
    slow: int | None = None,
    since: int = 0,
    factor: float = 1.2,
) -> Iterator[list[float]]:
    """Own times of 50 ms, longer and shorter together (a step with long sentences), with a hiccup in a hundred."""
    for step in range(steps):
        common = 0.05 * (1 + 0.3 * math.sin(step / 7))
        row = [common * math.exp(rng.gauss(0, noise)) for _ in range(world)]
        row = [own * rng.uniform(1.5, 6) if rng.random() < 0.01 else own for own in row]
        if slow is not None and step >= since:
            row[slow] *= factor
        yield row


def told(rows: Iterator[list[float]], every: int, least_factor: float = 1.1) -> dict[int, list[str]]:
    """What is said after which step, with a row in the log every so many steps."""
    watch, lines, held = SlowRanks(least_factor), {}, []
    for step, row in enumerate(rows, 1):
        held.append(row)
        if step % every == 0:
            if new := watch.look(held[-16:]):
                lines[step] = new
            held = []
    return lines


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_thousand_clean_steps_raise_no_alarm(world: int, every: int) -> None:
    for seed, noise in enumerate((0.01, 0.03, 0.05)):
        assert told(trace(random.Random(seed), 1000, world, noise), every) == {}


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(("world", "noise"), [(2, 0.03), (3, 0.05), (8, 0.05), (64, 0.05)])
def test_a_fifth_slower_is_named_within_twenty_steps(world: int, noise: float, every: int) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        rank, since = rng.randrange(world), rng.randrange(20, 60)
        lines = told(trace(rng, since + 40, world, noise, rank, since), every)
        (step,) = lines
        assert since < step <= since + 20
        (line,) = lines[step]
        assert line.startswith(f"rank {rank} is slow: its own work takes 1.")


RECORDED: list[list[float]] = json.loads(Path(__file__).with_name("recorded_seconds.json").read_text())
"""`own_step_seconds` of each of four ranks (`monitor.rank_metrics`) in 1,000 steps on two cores with other work:
the ranks differ by a tenth from step to step."""


@pytest.mark.parametrize("every", [1, 10])
def test_recorded_steps_raise_no_alarm(every: int) -> None:
    assert told(iter(RECORDED), every) == {}


@pytest.mark.parametrize(("factor", "within_twenty"), [(1.2, 0.8), (1.4, 1.0)])
def test_recorded_steps_with_a_rank_made_slower(factor: float, within_twenty: float) -> None:
    """With that much noise a fifth is found in twenty steps as a rule, in sixty always; two fifths always."""
    after = []
    for since, rank in itertools.product(range(100, 900, 37), range(4)):
        rows = [[*row[:rank], factor * row[rank], *row[rank + 1 :]] for row in RECORDED[since : since + 60]]
        lines = told(iter([*RECORDED[since - 64 : since], *rows]), 1)
        step, said = next(iter(lines.items()))
        assert said[0].startswith(f"rank {rank} is slow")
        after.append(step - 64)
    assert max(after) <= 60
    assert sum(steps <= 20 for steps in after) >= within_twenty * len(after)


def test_one_that_recovers_is_told() -> None:
    rng = random.Random(0)
    rows = [*trace(rng, 100, 4, 0.02, slow=2, since=50, factor=3.0), *trace(rng, 100, 4, 0.02)]
    (first, [named]), (second, [recovered]) = told(iter(rows), 1).items()
    assert named.startswith("rank 2 is slow: its own work takes ")
    assert recovered == "rank 2 is no longer slow"
    assert (50 < first <= 70, 100 < second <= 164) == (True, True)


def test_all_of_them_slower_is_nobodys_fault() -> None:
    rng = random.Random(0)
    slower = [[3 * own for own in row] for row in trace(rng, 100, 4, 0.02)]
    assert told(iter([*trace(rng, 100, 4, 0.02), *slower]), 1) == {}


def test_less_than_a_millisecond_is_nothing() -> None:
    assert slow_ranks([[0.001, 0.0015]] * 20, 1.1) == {}
    assert slow_ranks([[0.001, 0.0025]] * 20, 1.1) == {1: pytest.approx(2.5)}
    assert slow_ranks([[0.00001, 0.000015]] * 20, 1.1, least_seconds=0.0) == {1: pytest.approx(1.5)}


def test_one_rank_has_nobody_to_be_compared_with() -> None:
    assert told(trace(random.Random(0), 50, 1, 0.02), 1) == {}


def test_too_little_to_say() -> None:
    assert slow_ranks([], 1.1) == {}
    assert slow_ranks([[0.1, 0.3]] * 19, 1.1) == {}
    assert slow_ranks([[0.1]] * 50, 1.1) == {}
    assert slow_ranks([[0.0, 0.0]] * 50, 1.1) == {}
