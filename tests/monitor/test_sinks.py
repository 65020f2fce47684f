"""Where metrics go: a file that a resumed run continues, and a terminal or none."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from disttrain.monitor import ConsoleSink, JsonlSink

RECORD = {
    "step": 3,
    "tokens": 96,
    "loss": 1.25,
    "lr": 0.001,
    "grad_norm": 2.0,
    "tokens_per_second": 12345.6,
    "seconds_left": 7.4,
}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(path: Path, *steps: int) -> None:
    sink = JsonlSink(path, resumed_step=10_000)
    for step in steps:
        sink.log({"step": step, "loss": step / 7})
    sink.close()


def test_a_record_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resumed_step=0)
    sink.log(RECORD)
    assert lines(path) == [RECORD]
    sink.close()


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2, 3)
    assert [record["loss"] for record in lines(path)] == [1 / 7, 2 / 7, 3 / 7]


@pytest.mark.parametrize(("resumed_step", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2]), (9, [1, 2, 4, 6])])
def test_a_resumed_run_continues_where_it_resumed(tmp_path: Path, resumed_step: int, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2, 4, 6)
    sink = JsonlSink(path, resumed_step)
    sink.log({"step": resumed_step + 1})
    sink.close()
    assert [record["step"] for record in lines(path)] == [*kept, resumed_step + 1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3', "\x00\x00\x00", "{}", "null", "17"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    with path.open("a") as file:
        file.write(torn)
    sink = JsonlSink(path, resumed_step=5)
    sink.log({"step": 3})
    sink.close()
    assert [record["step"] for record in lines(path)] == [1, 2, 3]


def test_a_truncation_that_fails_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2, 3)
    before = path.read_text()

    def killed(*unused: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonlSink(path, resumed_step=1)
    assert path.read_text() == before


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resumed_step=0)
    sink.log({"step": 1, "a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 1e308})
    sink.close()
    (record,) = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert record == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": 1e308}
    assert float(record["a"]) != float(record["a"])


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=120, highlight=False, soft_wrap=True), file


def test_plain_lines_where_there_is_no_terminal() -> None:
    screen, file = console(terminal=False)
    sink = ConsoleSink(total_steps=10, first_step=0, console=screen)
    sink.log(RECORD)
    sink.say("resumed from [runs/a] (step 3)")
    sink.close()
    assert file.getvalue() == (
        "step 3/10  loss 1.2500  lr 1.00e-03  norm 2.00  12,346 tok/s  7 s left\nresumed from [runs/a] (step 3)\n"
    )


def test_numbers_that_are_not_finite_are_shown() -> None:
    screen, file = console(terminal=False)
    sink = ConsoleSink(total_steps=10, first_step=0, console=screen)
    sink.log(RECORD | {"loss": float("nan"), "grad_norm": float("inf")})
    assert "loss nan" in file.getvalue()
    assert "norm inf" in file.getvalue()


def test_a_bar_on_a_terminal() -> None:
    screen, file = console(terminal=True)
    sink = ConsoleSink(total_steps=10, first_step=2, console=screen)
    try:
        sink.log(RECORD | {"step": 4})
        sink.say("step 4: validation loss 1.5 [not markup]")
        sink.log(RECORD | {"step": 10})
    finally:
        sink.close()
    shown = file.getvalue()
    assert "step 4: validation loss 1.5 [not markup]" in shown
    assert "step 10/10" in shown
    assert "1.2500" in shown


def test_closing_twice_does_no_harm() -> None:
    for terminal in (False, True):
        sink = ConsoleSink(total_steps=1, first_step=0, console=console(terminal)[0])
        sink.close()
        sink.close()
