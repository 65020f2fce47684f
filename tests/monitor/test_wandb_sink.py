"""The W&B sink with a client that breaks, and the reader of W&B's files on damaged ones."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from disttrain.config.monitor import WandbConfig
from disttrain.monitor.sinks.wandb import WandbRun, WandbSink
from disttrain.monitor.sinks.wandb_file import history, last_recorded_step

BLOCK = 32 * 1024


class Client:
    """As much of W&B's client as the sink uses; `log` breaks where it is told to."""

    def __init__(self, broken: str) -> None:
        self.broken, self.calls = broken, []  # type: ignore[var-annotated]

    def log(self, row: dict[str, Any], step: int) -> None:
        if self.broken in row:
            raise ConnectionError("gone")
        self.calls.append((step, sorted(row)))

    def alert(self, *arguments: Any, **named: Any) -> None:
        self.calls.append("alert")

    def mark_preempting(self) -> None:
        self.calls.append("preempting")

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[WandbSink, Client]:
    client = Client(getattr(request, "param", ""))
    settings = SimpleNamespace(model_fields={})
    fake = SimpleNamespace(init=lambda **named: client, Settings=settings, Table=lambda columns, data: data)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = WandbRun("abc", "run", tmp_path, {}, lambda sent: [])
    return WandbSink(WandbConfig(mode="offline"), run, pytest.fail), client


def test_rows_of_a_step_go_together(sink: tuple[WandbSink, Client]) -> None:
    watched, client = sink
    for step in (1, 2):
        watched.log({"step": step, "loss": 1.0})
        watched.log({"step": step, "validation_loss": 2.0})
    watched.sample(2, "words")
    watched.log({"step": 2, "checkpoint_step": 2})
    watched.close("completed")
    assert client.calls == [
        (1, ["loss", "step", "validation_loss"]),
        (2, ["checkpoint_step", "loss", "step", "validation_loss"]),
        (2, ["samples"]),
        ("finish", 0),
    ]


@pytest.mark.parametrize("sink", ["samples", "loss"], indirect=True)
def test_it_finishes_whatever_fails(sink: tuple[WandbSink, Client]) -> None:
    watched, client = sink
    watched.log({"step": 1, "loss": 1.0})
    watched.sample(1, "words")
    with pytest.raises(ConnectionError):
        watched.close("preempted")
    assert client.calls[-1] == ("finish", 0)


def written(folder: Path, steps: int) -> Path:
    """A file as the client writes it: records cut into blocks."""
    parse: Any = wandb_internal_pb2
    content = bytearray(b":W&B\xe1\xbe\x00")
    for step in range(1, steps + 1):
        record = parse.Record()
        record.history.step.num = step
        record.history.item.add(key="loss", value_json="1" * 700)
        _append(content, record.SerializeToString())
    file = folder / "wandb" / "offline-run-1-abc" / "run-abc.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return file


def _append(content: bytearray, record: bytes) -> None:
    first = True
    while True:
        left = BLOCK - len(content) % BLOCK
        if left < 7:
            content += bytes(left)
            continue
        part, record = record[: left - 7], record[left - 7 :]
        kind = 1 if first and not record else 2 if first else 3 if record else 4
        content += struct.pack("<IHB", 0, len(part), kind) + part
        first = False
        if not record:
            return


def test_a_file_of_many_blocks(tmp_path: Path) -> None:
    assert len(list(history(written(tmp_path, 300)))) == 300
    assert last_recorded_step(tmp_path, "abc") == 300
    assert last_recorded_step(tmp_path, "other") == 0


@pytest.mark.parametrize("cut", [0, 3, 7, 9, 40_000, 65_536, 65_540])
def test_a_file_that_was_cut(tmp_path: Path, cut: int) -> None:
    file = written(tmp_path, 300)
    file.write_bytes(file.read_bytes()[:cut])
    assert last_recorded_step(tmp_path, "abc") == len(list(history(file))) <= cut / 700


@pytest.mark.parametrize("damage", ["zeros", "bits"])
def test_a_damaged_page_costs_what_was_on_it(tmp_path: Path, damage: str) -> None:
    file = written(tmp_path, 300)
    content = bytearray(file.read_bytes())
    if damage == "zeros":
        content[2 * BLOCK + 4096 : 2 * BLOCK + 8192] = bytes(4096)
    else:
        for place in range(2 * BLOCK, 3 * BLOCK, 97):
            content[place] ^= 1
    file.write_bytes(content)
    assert len(list(history(file))) > 200
    assert last_recorded_step(tmp_path, "abc") == 300
