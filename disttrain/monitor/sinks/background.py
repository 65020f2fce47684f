"""A sink in a thread of its own: unreachable, full or slow, it harms no step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from disttrain.monitor.record import Record
from disttrain.monitor.sinks.base import Ending, Event, Sink

Task = Callable[[Sink], Any]
CAPACITY = 2_000
"""Rows that wait for a sink at most; later ones are not kept for it."""


class BackgroundSink:
    """Builds a sink and feeds it. `say` prints a warning; metrics.jsonl has every row whatever happens here."""

    def __init__(
        self, name: str, build: Callable[[], Sink], say: Callable[[str], None], capacity: int = CAPACITY
    ) -> None:
        self.name, self._build, self._say = name, build, say
        self._waiting: queue.Queue[Task | None] = queue.Queue(capacity)
        self._ending: Ending | None = None
        self._lost = 0
        self._troubled = False
        # A daemon: a sink that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        self._put(lambda sink: sink.log(record))

    def event(self, event: Event) -> None:
        self._put(lambda sink: sink.event(event))

    def sample(self, step: int, text: str) -> None:
        self._put(lambda sink: sink.sample(step, text))

    def finish(self, ending: Ending) -> None:
        """Deliver what waits, then close the sink; `join` waits for that."""
        self._ending = ending
        # In vain where the queue is full: then the thread looks at `_ending` when it has emptied it.
        with suppress(queue.Full):
            self._waiting.put_nowait(None)

    def join(self, seconds: float) -> None:
        """Say what could not be delivered within `seconds`."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"still busy with {self._waiting.qsize()} rows at the end; left behind")
        elif self._lost:
            self._warn(f"{self._lost} rows did not reach it")

    def _put(self, task: Task) -> None:
        try:
            self._waiting.put_nowait(task)
        except queue.Full:
            self._lost += 1
            self._trouble(f"{self._waiting.maxsize} rows wait for it already: later ones are not kept for it")

    def _run(self) -> None:
        sink = self._built()
        while (task := self._next()) is not None:
            if sink is not None:
                self._attempt(task, sink)
        if sink is not None and self._ending is not None:
            ending = self._ending
            self._attempt(lambda sink: sink.close(ending), sink)

    def _next(self) -> Task | None:
        """None when everything was delivered and the end has come."""
        if self._ending is not None and self._waiting.empty():
            return None
        return self._waiting.get()

    def _attempt(self, task: Task, sink: Sink) -> None:
        try:
            task(sink)
        # Whatever a client library raises: the run has nothing to do with it.
        except Exception as error:
            self._lost += 1
            self._trouble(_line(error))

    def _built(self) -> Sink | None:
        try:
            return self._build()
        except Exception as error:
            self._trouble(f"switched off: {_line(error)}")
            return None

    def _trouble(self, text: str) -> None:
        """The first trouble is told; what follows is counted."""
        if not self._troubled:
            self._troubled = True
            self._warn(text)

    def _warn(self, text: str) -> None:
        self._say(f"{self.name}: {text}; metrics.jsonl has every row")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
