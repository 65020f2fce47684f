"""The endpoint that Prometheus scrapes, read over loopback."""

from __future__ import annotations

import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from prometheus_client.parser import text_string_to_metric_families

from disttrain.monitor import Event
from disttrain.monitor.sinks.prometheus import READERS, PrometheusSink

TOKEN = "a" * 32


@pytest.fixture(params=[None, TOKEN])
def sink(request: pytest.FixtureRequest) -> Iterator[PrometheusSink]:
    said: list[str] = []
    sink = PrometheusSink("my-run", "127.0.0.1", 0, request.param, said.append)
    assert said == [f"Prometheus: http://127.0.0.1:{sink.port}/metrics"]
    yield sink
    sink.close("completed")


def scraped(port: int, token: str | None = TOKEN) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "run"}
            assert sample.labels["run"] == "my-run"
            found.setdefault(sample.name, {})[tuple(labels.items())] = sample.value
    return found


def test_the_newest_numbers_with_labels(sink: PrometheusSink) -> None:
    for step in (1, 2):
        sink.log({"step": step, "loss": 3.0 / step, "lr": 0.1, "lr/decay": 0.1, "lr/no_decay": 0.2})
        sink.log({"step": step, "validation_loss": 4.0, "max_attention_logit/3": 7.0})
        sink.log({"step": step, "unit_norm/layer3.mlp.up": 1.5, "rank/0/cpu_share": 0.5, "rank/1/cpu_share": 0.25})
        sink.event(Event(0.0, step, "checkpoint", "text"))
    numbers = scraped(sink.port)
    assert numbers["disttrain_loss"] == {(): 1.5}
    assert numbers["disttrain_step"] == {(): 2.0}
    assert numbers["disttrain_validation_loss"] == {(): 4.0}
    assert numbers["disttrain_lr"] == {(): 0.1}
    assert numbers["disttrain_lr_of_group"] == {(("group", "decay"),): 0.1, (("group", "no_decay"),): 0.2}
    assert numbers["disttrain_max_attention_logit_of_layer"] == {(("layer", "3"),): 7.0}
    assert numbers["disttrain_unit_norm"] == {(("unit", "layer3.mlp.up"),): 1.5}
    assert numbers["disttrain_rank_cpu_share"] == {(("rank", "0"),): 0.5, (("rank", "1"),): 0.25}
    assert numbers["disttrain_events_total"] == {(("kind", "checkpoint"),): 2.0}


@pytest.mark.parametrize("sent", [None, "a" * 31, "a" * 33, "ä" * 32])
def test_a_wrong_token_reads_nothing(sent: str | None) -> None:
    sink = PrometheusSink("my-run", "127.0.0.1", 0, TOKEN, lambda text: None)
    sink.log({"step": 1, "loss": 3.0})
    try:
        with pytest.raises((urllib.error.HTTPError, UnicodeEncodeError)) as refused:
            scraped(sink.port, sent)
        if isinstance(refused.value, urllib.error.HTTPError):
            assert refused.value.code == 401
            assert b"loss" not in refused.value.read()
    finally:
        sink.close("completed")


def test_only_this_machine_is_listened_to(sink: PrometheusSink) -> None:
    assert sink._server.socket.getsockname()[0] == "127.0.0.1"


def test_one_reader_that_hangs_does_not_keep_others_out(sink: PrometheusSink) -> None:
    with socket.create_connection(("127.0.0.1", sink.port)) as stuck:
        stuck.sendall(b"GET /met")
        sink.log({"step": 1, "loss": 3.0})
        assert scraped(sink.port)["disttrain_loss"] == {(): 3.0}


def test_a_port_that_is_taken(sink: PrometheusSink) -> None:
    with pytest.raises(OSError, match="in use"):
        PrometheusSink("other", "127.0.0.1", sink.port, None, pytest.fail)


def test_ipv6() -> None:
    said: list[str] = []
    try:
        sink = PrometheusSink("my-run", "::1", 0, None, said.append)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    assert said == [f"Prometheus: http://[::1]:{sink.port}/metrics"]
    sink.close("completed")


def test_readers_that_go_away_print_nothing_and_cost_no_threads(
    sink: PrometheusSink, capfd: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", sink.port)))
            # Closing sends a reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(b"GET /met")
        assert threading.active_count() <= before + 2 * READERS + 1
    sink.log({"step": 1, "loss": 3.0})
    for _ in range(100):
        with suppress(OSError):
            assert scraped(sink.port)["disttrain_loss"] == {(): 3.0}
            break
        time.sleep(0.05)
    else:
        pytest.fail("nobody is answered any more")
    assert capfd.readouterr().err == ""
