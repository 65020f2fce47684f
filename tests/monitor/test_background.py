"""Sinks that are unreachable, broken, slow or stuck: the run goes on, and says once what was lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from disttrain.monitor import BackgroundSink, Ending, Event, Record
from disttrain.monitor.sinks.base import Sink


class Rows:
    """Keeps what it gets; `trouble` is called before each row."""

    def __init__(self, trouble: Callable[[], None] = lambda: None) -> None:
        self.trouble = trouble
        self.steps: list[float] = []
        self.events: list[str] = []
        self.samples: list[str] = []
        self.ending: str | None = None

    def log(self, record: Record) -> None:
        self.trouble()
        self.steps.append(record["step"])  # type: ignore[arg-type]

    def event(self, event: Event) -> None:
        self.events.append(event.kind)

    def sample(self, step: int, text: str) -> None:
        self.samples.append(text)

    def close(self, ending: Ending) -> None:
        self.ending = ending


def fed(build: Callable[[], Sink], *, rows: int = 20, seconds: float = 5.0, capacity: int = 100) -> list[str]:
    """What is said about a sink that gets `rows` and is closed; feeding it takes no time whatever it does."""
    said: list[str] = []
    sink = BackgroundSink("it", build, said.append, capacity)
    began = time.monotonic()
    for step in range(rows):
        sink.log({"step": step})
    assert time.monotonic() - began < seconds
    sink.finish("completed")
    sink.join(seconds)
    return said


def test_everything_arrives_in_order() -> None:
    rows = Rows()
    sink = BackgroundSink("it", lambda: rows, pytest.fail)
    for step in range(500):
        sink.log({"step": step})
    sink.event(Event(0.0, 3, "warning", "text"))
    sink.sample(4, "words")
    sink.finish("preempted")
    sink.join(5.0)
    assert rows.steps == list(range(500))
    assert (rows.events, rows.samples, rows.ending) == (["warning"], ["words"], "preempted")


def test_one_that_cannot_be_built() -> None:
    def unreachable() -> Sink:
        raise ConnectionError("no route to host\nand a long story")

    assert fed(unreachable) == ["it: switched off: no route to host; metrics.jsonl has every row"]


def test_one_that_breaks_now_and_then_gets_the_rest() -> None:
    broken = iter([True, True, False] * 100)

    def trouble() -> None:
        if next(broken):
            raise OSError("disk full")

    rows = Rows(trouble)
    said = fed(lambda: rows, rows=30)
    assert said == [
        "it: disk full; metrics.jsonl has every row",
        "it: 20 rows did not reach it; metrics.jsonl has every row",
    ]
    assert rows.steps == list(range(2, 30, 3))
    assert rows.ending == "completed"


@pytest.mark.parametrize("where", ["build", "log"])
def test_one_that_hangs_is_left_behind(where: str) -> None:
    free = threading.Event()

    def build() -> Sink:
        if where == "build":
            free.wait()
        return Rows(lambda: None if where == "build" else bool(free.wait()) and None)

    try:
        said = fed(build, rows=150, seconds=0.3)
    finally:
        free.set()
    assert said[0] == "it: 100 rows wait for it already: later ones are not kept for it; metrics.jsonl has every row"
    assert said[1].startswith("it: still busy with ")
    assert len(said) == 2


def test_a_full_queue_does_not_keep_it_from_its_end() -> None:
    free, rows = threading.Event(), Rows()
    rows.trouble = lambda: bool(free.wait()) and None
    sink = BackgroundSink("it", lambda: rows, lambda text: None, capacity=3)
    for step in range(10):
        sink.log({"step": step})
    sink.finish("completed")
    free.set()
    sink.join(5.0)
    assert rows.ending == "completed"


def test_a_slow_one_gets_everything_when_there_is_time() -> None:
    rows = Rows(lambda: time.sleep(0.01))
    assert fed(lambda: rows, rows=20) == []
    assert rows.steps == list(range(20))
