"""What is read from run folders and curves, and how it is drawn."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from disttrain.studies.drawing import curves_svg, intervals_svg
from disttrain.studies.estimate import estimated_seconds
from disttrain.studies.outcomes import Outcome, read_outcome
from disttrain.studies.page import page
from disttrain.studies.plan import Cell
from disttrain.studies.summary import mean_curve, step_ratio, steps_to_target, summarise, tokens_to_baseline
from disttrain.studies.tables import as_json, cells, header, markdown, notes, warnings
from tests.studies.toys import ToyTrainer, base, plan, runner


def outcome(*losses: float, over_model: float | None = 1.5) -> Outcome:
    curve = tuple((100 * (place + 1), place + 1, loss) for place, loss in enumerate(losses))
    return Outcome(losses[-1], curve, over_model, 800, 2.0)


def test_tokens_to_the_loss_of_the_baseline() -> None:
    baseline = {1: outcome(5, 4, 3), 2: outcome(5, 4, 3.2)}
    assert tokens_to_baseline({1: outcome(4, 2, 1)}, baseline, 300) == pytest.approx(150 / 300)
    both = {1: outcome(4, 2, 1), 2: outcome(3, 2, 1)}  # there before its first evaluation: at it, at most
    assert tokens_to_baseline(both, baseline, 300) == pytest.approx((150 + 100) / 2 / 300)
    assert tokens_to_baseline({1: outcome(4, 2, 1), 2: outcome(5, 4, 3.3)}, baseline, 300) is None
    assert tokens_to_baseline({1: outcome(math.inf, 2, 1)}, baseline, 300) == pytest.approx(200 / 300)
    assert tokens_to_baseline({7: outcome(1)}, baseline, 300) is None
    assert tokens_to_baseline({1: outcome(4, 2)}, {1: outcome(5, math.inf)}, 300) is None


def test_times_are_ratios_by_seed_and_marked_where_seeds_disagree() -> None:
    baseline = {1: outcome(3, over_model=1.2), 2: outcome(3, over_model=1.2)}
    ratio, noisy = step_ratio({1: outcome(3, over_model=1.8), 2: outcome(3, over_model=1.8)}, baseline)
    assert ratio == pytest.approx(1.5)
    assert not noisy
    assert step_ratio({1: outcome(3, over_model=1.8), 2: outcome(3, over_model=2.4)}, baseline)[1]
    assert step_ratio({1: outcome(3, over_model=None)}, baseline) == (None, False)


def test_steps_to_a_target_need_all_later_ones_too() -> None:
    close = [0.001 * seed for seed in range(4)]
    finals = {seed: outcome(5 + off, 2 + off, 4 + off, 2.5 + off, 2 + off) for seed, off in enumerate(close)}
    steps, p = steps_to_target(finals, 3.0)
    assert steps == 4  # at step 2 it was below once, and rose again
    assert p is not None
    assert p < 1e-6
    assert steps_to_target(finals, 1.9)[0] is None
    assert steps_to_target({1: outcome(1)}, 3.0) == (None, None)
    assert steps_to_target(finals, None) == (None, None)


def test_a_curve_has_the_points_that_all_seeds_have() -> None:
    assert mean_curve([outcome(5, 4), outcome(3, 2, 1)]) == ((100, 4.0), (200, 3.0))
    assert mean_curve([outcome(math.inf, 4)]) == ((200, 4.0),)


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    rows = [
        {"step": 1, "forward_seconds": 9.0, "backward_seconds": 9.0, "optimizer_seconds": 99.0},
        {"step": 3, "forward_seconds": 1.0, "backward_seconds": 1.0, "optimizer_seconds": 2.0},
        {"step": 4, "forward_seconds": 1.0, "backward_seconds": 1.0, "optimizer_seconds": 5.0, "data_seconds": 0.5},
        {"step": 4, "tokens": 64, "validation_loss": "nan"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "torn")
    (tmp_path / "status.json").write_text('{"state": "running", "step": 4}')
    assert read_outcome(tmp_path) is None
    (tmp_path / "status.json").write_text('{"state": "completed", "step": 4}')
    found = read_outcome(tmp_path)
    assert found is not None
    assert found.loss == math.inf
    assert found.step_over_model == pytest.approx((2 * 4.0 + 7.5) / (2 * 2.0 + 2.0))
    assert found.state_bytes is None  # no checkpoint is left


def test_page_table_and_charts_hold_together(tmp_path: Path) -> None:
    found = plan("adamw,muon,lion", protocol="track3", target=3.0, seeds=2)
    work = runner(found, tmp_path, ToyTrainer("lion-lr0.0001-wd0.03-seed8"))
    work.run()
    results = summarise(found, work.outcomes, work.failed)
    assert header(found)[-1] == "steps to target"
    assert {len(cells(found, result)) for result in results} == {len(header(found))}
    assert cells(found, results[2])[5] == "no verdict"
    for svg in (curves_svg(found, results), intervals_svg(found, results)):
        ElementTree.fromstring(svg)
    html = page(found, results, "disttrain compare <script>")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert html.count("<svg") == 2
    text = markdown(found, results, "c")
    assert all(note in text for note in notes(found))
    assert "0.0003, 0.1: " in text


def test_charts_of_nothing_are_charts() -> None:
    found = plan()
    for svg in (curves_svg(found, summarise(found, {})), intervals_svg(found, summarise(found, {}))):
        ElementTree.fromstring(svg)


def test_runs_that_end_without_a_finite_loss_are_told(tmp_path: Path) -> None:
    found = plan(seeds=2)
    work = runner(found, tmp_path, ToyTrainer())
    work.run()
    diverged = {("adamw", 8), ("muon", 9)}
    ends = {cell: outcome for cell, outcome in work.outcomes.items() if (cell.row, cell.seed) in diverged}
    wild = {cell: replace(outcome, loss=math.inf) for cell, outcome in ends.items()}
    results = summarise(found, work.outcomes | wild)
    assert [line.split(": ", 1)[1] for line in warnings(results)] == [
        f"the loss at the end is not finite for seed {seed}: no mean, no verdict" for seed in (8, 9)
    ]
    assert cells(found, results[1])[3:6] == ["–", "–", "no verdict"]
    json.loads(as_json(found, results, "c"))
    ElementTree.fromstring(intervals_svg(found, results))


def test_names_of_any_length_fit_the_charts(tmp_path: Path) -> None:
    found = plan(seeds=2)
    work = runner(found, tmp_path, ToyTrainer())
    work.run()
    results = summarise(found, work.outcomes)
    long = [
        replace(result, row=replace(result.row, label=50 * name)) for result, name in zip(results, "ab", strict=True)
    ]
    for svg in (curves_svg(found, long), intervals_svg(found, long)):
        chart = ElementTree.fromstring(svg)
        width = float(chart.attrib["viewBox"].split()[2])
        for text in (
            text for text in chart.iter("{http://www.w3.org/2000/svg}text") if text.text in ("a" * 50, "b" * 50)
        ):
            at = float(text.attrib["x"])
            begin = at - 350 if text.attrib["text-anchor"] == "end" else at
            assert 0 <= begin < begin + 350 <= width


def test_an_estimate_grows_with_the_budget() -> None:
    small, large = (estimated_seconds(base(), plan(tokens=tokens)) for tokens in (5120, 512_000_000))
    assert small is not None
    assert large is not None
    assert 0 < small < large
    assert estimated_seconds(base(device="cuda"), plan()) is None


def test_names_of_cells_are_names_of_runs() -> None:
    cell = Cell("mypkg.module:MyUpdate", 1e20, 1e-5, 3)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", cell.name)
    assert replace(cell, rate=0.001).name != replace(cell, rate=0.0010000001).name
    assert str(cell) == "mypkg.module:MyUpdate, lr 1e+20, weight decay 1e-05, seed 3"
