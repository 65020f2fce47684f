"""Whether a node can be reached: a listener that answers the others, and calls to theirs. Every wait has a deadline."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from disttrain.doctor.facts import Node, Way

CALL_SECONDS = 3.0
CALLS = 3
"""Of which the fastest tells the clocks apart best."""
_LOOK_SECONDS = 0.2
_MOST_BYTES = 4096


class Listener:
    """Answers each call with this visit's nonce and the time here; on one address only, and nothing else."""

    def __init__(self, address: str, nonce: str, clock: Callable[[], float] = time.time) -> None:
        self._nonce, self._clock = nonce, clock
        self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._socket.bind((address, 0))
        self._socket.listen(128)
        self._socket.settimeout(_LOOK_SECONDS)
        self.place: tuple[str, int] = self._socket.getsockname()[:2]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="doctor's listener", daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _answer(self) -> None:
        while not self._over.is_set():
            with suppress(OSError):
                caller, _ = self._socket.accept()
                with caller:
                    caller.settimeout(_LOOK_SECONDS)
                    answer = {"nonce": self._nonce, "unix_seconds": self._clock()}
                    caller.sendall(json.dumps(answer).encode())


def call_node(source: str, target: Node, seconds: float = CALL_SECONDS, clock: Callable[[], float] = time.time) -> Way:
    """Call the listener of `target` and compare clocks; the result says how it went, nothing is raised."""
    if target.listens is None:
        return Way(source=source, target=target.host, error="it does not listen")
    address, port = target.listens
    place = f"{address}:{port}"
    best: Way | None = None
    for _ in range(CALLS):
        try:
            before = clock()
            answer = _call(address, port, seconds)
            after = clock()
        except (OSError, ValueError) as error:
            return Way(source=source, target=target.host, address=place, error=reason(error, seconds))
        if answer.get("nonce") != target.nonce:
            return Way(source=source, target=target.host, address=place, error="somebody else answers there")
        if best is None or (after - before) / 2 < best.clock_error_seconds:
            best = Way(
                source=source,
                target=target.host,
                address=place,
                connect_seconds=after - before,
                clock_ahead_seconds=float(answer["unix_seconds"]) - (before + after) / 2,
                clock_error_seconds=(after - before) / 2,
            )
    assert best is not None
    return best


def tcp_problem(host: str, port: int, seconds: float) -> str | None:
    """Why no connection to HOST:PORT comes about within so many seconds; None where one does."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except (OSError, UnicodeError) as error:
        return reason(error, seconds)
    return None


def wait_for_port(host: str, port: int, seconds: float) -> str | None:
    """The same for one that may come up later: tried until then."""
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        problem = tcp_problem(host, port, max(0.1, min(CALL_SECONDS, left)))
        if problem is None or left <= 0:
            return problem
        time.sleep(_LOOK_SECONDS)


def reason(error: BaseException, seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:.3g} s"
    return str(getattr(error, "strerror", None) or error)


def _call(address: str, port: int, seconds: float) -> dict[str, Any]:
    """ValueError where what answers is no doctor."""
    with socket.create_connection((address, port), timeout=seconds) as connection:
        content = b""
        while len(content) < _MOST_BYTES and (part := connection.recv(_MOST_BYTES)):
            content += part
    answer = json.loads(content or b"null")
    if not isinstance(answer, dict) or not isinstance(answer.get("unix_seconds"), int | float):
        raise ValueError("somebody else answers there")
    return answer
