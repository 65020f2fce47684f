"""Where the wall time of a run goes, over kills and stops."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.train import run_time
from disttrain.train.run_time import RunTime, resume_time


class Clock:
    """One clock for wall time and intervals that goes by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(run_time.time, "time", lambda: self.now)
        monkeypatch.setattr(run_time.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def steps(clock: Clock, time: RunTime, count: int) -> None:
    for _ in range(count):
        clock.now += 2.0
        time.step()


def session(clock: Clock, extra: dict[str, Any], earlier: dict[str, Any]) -> RunTime:
    started = clock.now
    clock.now += 5.0
    time = resume_time(started, extra, earlier)
    clock.now += 1.0
    time.ready()
    return time


def test_a_run_without_trouble(clock: Clock) -> None:
    time = session(clock, {}, {})
    steps(clock, time, 10)
    with time.lost_to("evaluation"):
        clock.now += 4.0
    steps(clock, time, 5)
    assert time.productive_seconds == 30.0
    assert time.lost_seconds == {"startup": 6.0, "evaluation": 4.0}
    assert time.goodput == 0.75


def test_a_kill_costs_what_is_done_again_and_the_time_until_the_restart(clock: Clock) -> None:
    time = session(clock, {}, {})
    steps(clock, time, 10)
    extra = time.record()
    steps(clock, time, 4)
    status = {"state": "running", **time.status()}
    clock.now += 30.0
    time = session(clock, extra, status)
    assert time.productive_seconds == 20.0
    assert time.lost_seconds == {"startup": 12.0, "recomputed": 8.0, "down": 30.0}
    steps(clock, time, 4)
    assert time.wall_seconds == pytest.approx(time.productive_seconds + sum(time.lost_seconds.values()))
    assert time.goodput == pytest.approx(28 / 78)


def test_a_stop_on_request_costs_only_the_new_start(clock: Clock) -> None:
    time = session(clock, {}, {})
    steps(clock, time, 10)
    extra, status = time.record(), {"state": "preempted", **time.status()}
    clock.now += 86_400.0
    time = session(clock, extra, status)
    steps(clock, time, 10)
    assert time.lost_seconds == {"startup": 12.0}
    assert time.goodput == pytest.approx(40 / 52)


def test_an_old_checkpoint_and_status_know_nothing_of_it(clock: Clock) -> None:
    time = session(clock, {"batches": {}}, {"state": "running", "step": 3})
    steps(clock, time, 1)
    assert time.lost_seconds == {"startup": 6.0}


def test_a_checkpoint_beyond_the_last_status(clock: Clock) -> None:
    """What was done in between was not lost."""
    time = session(clock, {}, {})
    steps(clock, time, 5)
    status = {"state": "running", **time.status()}
    steps(clock, time, 10)
    extra = time.record()
    clock.now += 30.0
    time = session(clock, extra, status)
    assert time.lost_seconds == {"startup": 12.0, "down": 30.0}
    assert time.wall_seconds == pytest.approx(time.productive_seconds + sum(time.lost_seconds.values()))


def test_time_between_a_step_and_a_loss_is_lost_too(clock: Clock) -> None:
    time = session(clock, {}, {})
    steps(clock, time, 1)
    clock.now += 3.0  # a row is written
    with time.lost_to("evaluation"):
        clock.now += 4.0
    assert time.lost_seconds["evaluation"] == 7.0


@pytest.mark.parametrize(
    "broken", [{"lost_seconds": None}, {"unix_seconds": "x"}, {"wall_seconds": [1]}, {"lost_seconds": {"a": "b"}}]
)
def test_a_status_that_somebody_spoilt(clock: Clock, broken: dict[str, Any]) -> None:
    time = session(clock, {}, {"state": "running", "step": 3, "productive_seconds": 2.0, **broken})
    steps(clock, time, 1)
    assert 0 < time.goodput <= 1


def test_a_clock_that_is_set_back(clock: Clock) -> None:
    time = session(clock, {}, {})
    steps(clock, time, 10)
    extra, status = time.record(), {"state": "running", **time.status(), "unix_seconds": 1e12, "wall_seconds": -5e3}
    time = session(clock, extra, status)
    assert time.wall_seconds >= time.productive_seconds + sum(time.lost_seconds.values())
    assert 0 < time.goodput <= 1
