"""Prometheus: the newest numbers at http://ADDRESS:PORT/metrics."""

from __future__ import annotations

import hmac
import re
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from disttrain.monitor.record import Record, scalars
from disttrain.monitor.sinks.base import Ending, Event

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
READERS = 16
_SECONDS = 10.0


class PrometheusSink:
    """Gauges `disttrain_METRIC`; what is measured for groups, units, layers and ranks has these as labels.

    Listens on `address`; with a `token`, whoever does not send `Authorization: Bearer TOKEN` gets 401. OSError when the
    port is taken.
    """

    def __init__(self, run: str, address: str, port: int, token: str | None, say: Callable[[str], None]) -> None:
        from prometheus_client import CollectorRegistry, Counter, make_wsgi_app

        self._run = run
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._events = Counter("disttrain_events", "What happened", ["run", "kind"], registry=self._registry)
        application = make_wsgi_app(self._registry)
        guarded = application if token is None else _guarded(application, token)
        self._server = make_server(address, port, guarded, _Server6 if ":" in address else _Server, _Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()
        shown = f"[{address}]" if ":" in address else address
        say(f"Prometheus: http://{shown}:{self.port}/metrics")

    def log(self, record: Record) -> None:
        for key, value in scalars(record).items():
            metric, labels = _parts(key)
            if metric not in self._gauges:
                self._gauges[metric] = self._gauge(metric, list(labels))
            self._gauges[metric].labels(run=self._run, **labels).set(value)

    def event(self, event: Event) -> None:
        self._events.labels(run=self._run, kind=event.kind).inc()

    def sample(self, step: int, text: str) -> None:
        pass

    def close(self, ending: Ending) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _gauge(self, metric: str, labels: list[str]) -> Any:
        from prometheus_client import Gauge

        return Gauge(f"disttrain_{metric}", metric.replace("_", " "), ["run", *labels], registry=self._registry)


def _parts(key: str) -> tuple[str, dict[str, str]]:
    """`lr/decay` is the gauge lr_of_group with a label; `rank/3/cpu_share` is rank_cpu_share."""
    first, _, rest = key.partition("/")
    if not rest:
        return _clean(first), {}
    if first == "rank":
        rank, _, metric = rest.partition("/")
        return _clean(f"rank_{metric}"), {"rank": rank}
    if first.startswith("unit_"):
        return _clean(first), {"unit": rest}
    # A gauge has the same labels always: the one of all groups goes by another name.
    label = "layer" if first == "max_attention_logit" else "group"
    return _clean(f"{first}_of_{label}"), {label: rest}


def _clean(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)


def _guarded(application: Application, token: str) -> Application:
    expected = f"Bearer {token}".encode()

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        sent = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1", "replace")
        if hmac.compare_digest(sent, expected):
            return application(environ, start)
        start("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
        return [b"send the token of monitor.prometheus.token_file as Authorization: Bearer TOKEN\n"]

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    """Threads, so that one reader that hangs does not keep the others out."""

    daemon_threads = True
    block_on_close = False
    _free = threading.BoundedSemaphore(READERS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """At most READERS at a time: who only connects must not cost the run a thread each."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        deadline = threading.Timer(_SECONDS, _cut_off, (request,))
        deadline.daemon = True
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away or says nothing is nobody's business here."""

    def server_bind(self) -> None:
        # Not WSGIServer's, which asks a name server for our name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


def _cut_off(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _SECONDS

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
