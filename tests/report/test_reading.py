"""Run folders as they are found: torn, damaged, old, and with numbers that are not finite."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from disttrain.errors import UserError
from disttrain.report.details import flattened
from disttrain.report.histogram import step_times
from disttrain.report.run_files import distinct_labels, read_lines, read_run, read_runs, split_samples
from disttrain.report.run_record import RunRecord
from disttrain.report.speed_charts import step_parts
from disttrain.report.summary import parallel
from disttrain.report.table import number


def record(*rows: dict, **more: object) -> RunRecord:
    return RunRecord(Path("run"), "run", {}, list(rows), **more)


def test_a_torn_last_line_is_no_problem(tmp_path: Path) -> None:
    file, notes = tmp_path / "metrics.jsonl", []
    file.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3, "lo')
    assert [row["step"] for row in read_lines(file, notes)] == [1, 2]
    assert notes == []


def test_other_damage_is_said(tmp_path: Path) -> None:
    file, notes = tmp_path / "metrics.jsonl", []
    file.write_bytes(b'{"step": 1}\n{"ste\xff\n[1, 2]\n{"step": 3}\n')
    assert [row["step"] for row in read_lines(file, notes)] == [1, 3]
    assert notes == ["metrics.jsonl: 2 lines are damaged and left out"]


@pytest.mark.parametrize(
    ("engine", "words"), [("deepspeed", "zero2 on 4 ranks by deepspeed"), ("native", "zero2 on 4 ranks")]
)
def test_who_ran_the_step(engine: str, words: str) -> None:
    config = {"engine": engine, "parallel": {"strategy": "zero2"}}
    assert parallel(RunRecord(Path("run"), "run", config, [], environment={"world": 4})) == words


def test_numbers() -> None:
    assert [number(value) for value in (1, 2.5, "inf", "-inf")] == [1.0, 2.5, math.inf, -math.inf]
    assert math.isnan(number("nan") or 0.0)
    assert [number(value) for value in (True, None, "3", [1], {})] == [None] * 5
    assert (number(10**400), number(-1e300), number(1e-300)) == (math.inf, -math.inf, 0.0)


def test_curves_hold_what_is_there() -> None:
    run = record(
        {"step": 1, "tokens": 10, "loss": 3.0, "unix_seconds": 100.0},
        {"step": 2, "tokens": 20, "loss": "nan", "mfu": 0.4},
        {"step": 2, "checkpoint_bytes": 7},
        {"step": 3, "tokens": 40, "loss": 2.0, "mfu": None, "unix_seconds": 130.0},
    )
    loss, mfu = run.curve("loss"), run.curve("mfu")
    assert loss is not None
    assert mfu is not None
    assert np.isnan(loss.values[1])
    assert loss.seconds[[0, 2]].tolist() == [0.0, 30.0]
    assert np.isnan(loss.seconds[1])
    assert (mfu.step.tolist(), mfu.tokens.tolist(), mfu.values.tolist()) == ([2], [20], [0.4])
    assert run.curve("grad_norm") is None
    # Checkpoint rows carry no tokens: they are those of their step.
    checkpoint = run.checkpoints.curve("checkpoint_bytes")
    assert checkpoint is not None
    assert checkpoint.tokens.tolist() == [20]


def test_samples() -> None:
    text = "noise\n--- step 5\na\n\nb\n--- step x\n\n--- step 10\n</script>\n"
    assert split_samples(text) == [(5, "a\n\nb\n--- step x"), (10, "</script>")]
    assert split_samples("") == []


def test_equal_names_get_the_part_of_the_path_that_differs() -> None:
    named = [("a", Path("/x/one/run")), ("a", Path("/x/two/run")), ("b", Path("/x/b"))]
    assert distinct_labels(named) == ["a (one/run)", "a (two/run)", "b"]
    assert distinct_labels([("a", Path("/x/p")), ("a", Path("/x/q"))]) == ["a (p)", "a (q)"]


def test_settings_are_flat() -> None:
    nested = {"a": {"b": 1, "c": {"d": [1, 2]}, "e": {}}, "f": None}
    assert flattened(nested) == {"a.b": 1, "a.c.d": [1, 2], "a.e": {}, "f": None}


def test_a_run_whose_other_files_are_damaged_is_still_shown(runs: tuple[Path, ...], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "run")
    for name in ("config.json", "status.json", "trace/summary.json"):
        (folder / name).write_text('{"torn": ')
    (folder / "ownership.json").write_text("[1]")
    (folder / "events.jsonl").unlink()
    run = read_run(folder)
    damaged = ("config.json", "status.json", "ownership.json", "summary.json")
    assert run.notes == tuple(f"{name}: damaged and left out" for name in damaged)
    assert (run.label, run.events) == ("run", [])


def test_every_problem_at_once(runs: tuple[Path, ...], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.json").write_text(json.dumps({"run": {"name": "fresh"}}))
    paths = [
        tmp_path / "nowhere",
        tmp_path / "file",
        tmp_path / "empty",
        fresh,
        runs[0],
        runs[0] / "." / "../muon",
        tmp_path / "loop",
        Path("x" * 5000),
    ]
    with pytest.raises(UserError) as caught:
        read_runs(paths)
    words = [
        "no such folder",
        "Not a directory",
        "no run folder",
        "no metrics yet",
        "given twice",
        "symbolic links",
        "too long",
    ]
    assert len(caught.value.problems) == len(words)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem


def test_step_times_add_up() -> None:
    def row(edges: list, counts: list) -> dict:
        return {"step": 1, "loss": 1.0, "step_seconds_histogram": {"edges": edges, "counts": counts}}

    times = step_times(record(row([0, 1, 2, 3, 4], [0, 2, 1, 0]), row([0, 1, 2, 3, 4], [0, 1, 0, 0])))
    assert times is not None
    assert (times.edges.tolist(), times.counts.tolist()) == ([1, 2, 3], [3, 1])
    assert (times.quantile(0.5), times.quantile(1.0)) == (2.0, 3.0)
    # Rows that show no more than their filled bins of the same edges: still exact, with a gap between 3 and 5.
    parts = step_times(record(row([1, 2, 3], [4, 1]), row([2, 3], [2]), row([5, 6], [1])))
    assert parts is not None
    assert (parts.edges.tolist(), parts.counts.tolist()) == ([1, 2, 3, 5, 6], [4, 3, 0, 1])
    # Other edges (the run was restarted with other settings): no step is lost.
    mixed = step_times(record(row([1, 2, 3], [3, 1]), row([0.5, 1.5, 9.5], [2, 5])))
    assert mixed is not None
    assert mixed.counts.sum() == 11
    bad = [row([1, 2], [1, 2]), row([2, 1], [1]), row([1, 2], ["x"]), row(["nan", 2], [1]), row([1, 2], [0])]
    assert step_times(record(*bad, {"step": 1, "loss": 1.0})) is None


def test_the_parts_of_a_step_add_up() -> None:
    row = {"step": 1, "loss": 1.0, "step_seconds": 1.0, "forward_seconds": 0.3, "backward_seconds": 0.5}
    other = {"step": 2, "loss": 1.0, "step_seconds": 0.5, "forward_seconds": 0.2, "backward_seconds": "nan"}
    found = step_parts(record(row | {"checkpoint_seconds": 2.0}, {"step": 2, "loss": 1.0}, other))
    assert found is not None
    total, parts = found
    assert list(parts) == ["forward", "backward", "other", "checkpoint"]
    assert total.step.tolist() == [1, 2]
    # Checkpoints stand between steps: they come on top of step_seconds.
    assert total.values.tolist() == pytest.approx([3.0, 0.5])
    assert parts["other"].tolist() == pytest.approx([0.2, 0.3])
    assert step_parts(record({"step": 1, "loss": 1.0, "step_seconds": 1.0, "data_seconds": 0.1})) is None
