"""The order of runs, their reuse, claims and failures, with a trainer that writes what a run would leave."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from disttrain.config import RunConfig
from disttrain.studies.folder import ComparisonFolder
from disttrain.studies.plan import Cell, Plan
from disttrain.studies.runner import StoppedError, claimed
from disttrain.studies.summary import RowResult, summarise
from disttrain.studies.tables import as_json, markdown, verdict, warnings
from tests.studies.toys import ToyTrainer, plan, runner


def compared(found: Plan, folder: Path, train: ToyTrainer, said: list[str] | None = None) -> list[RowResult]:
    work = runner(found, folder, train, said)
    work.run()
    return summarise(found, work.outcomes, work.failed)


def test_search_then_seeds_then_verdicts(tmp_path: Path) -> None:
    found, train = plan("adamw,muon,lion"), ToyTrainer()
    results = compared(found, tmp_path, train)
    assert len(train.trained) == 30
    assert train.trained[:3] == [f"{name}-lr{lr}-wd{wd}-seed7" for name, lr, wd in _FIRST]
    assert {name.rsplit("seed", 1)[1] for name in train.trained[21:]} == {"8", "9", "10"}
    assert [(result.best.rate, result.best.decay) for result in results if result.best] == [
        (3e-4, 0.1),
        (3e-4, 0.1),
        (1e-4, 0.03),
    ]
    assert [verdict(found, result) for result in results] == ["–", "better", "not distinguishable"]
    muon = results[1]
    assert muon.tokens_to_baseline == pytest.approx(1 - 0.2 / 3, abs=0.01)
    assert muon.step_ratio == pytest.approx(1.0)
    assert [line.split(":")[0] for line in warnings(results)] == ["lion"]


_FIRST = [("adamw", "7.5e-05", "0.1"), ("muon", "7.5e-05", "0.1"), ("lion", "2.5e-05", "0.3")]


def test_the_same_comparison_gives_the_same_table(tmp_path: Path) -> None:
    found, again = plan(), ToyTrainer()
    first = compared(found, tmp_path / "one", ToyTrainer())
    reused = compared(found, tmp_path / "one", again)
    anew = compared(found, tmp_path / "two", ToyTrainer())
    assert again.trained == []
    assert as_json(found, first, "c") == as_json(found, reused, "c") == as_json(found, anew, "c")
    assert markdown(found, first, "c") == markdown(found, anew, "c")


def test_a_mistuned_optimizer_is_warned_of(tmp_path: Path) -> None:
    """Its grid lies wholly below its best rate."""
    found = plan(rates=("muon=1e-6,2e-6,4e-6,8e-6,1.6e-5",))
    results = compared(found, tmp_path, ToyTrainer())
    (warning,) = warnings(results)
    assert warning.startswith("muon: the best lr 1.6e-05 is the largest of its grid, ")
    assert "ahead of 8e-06: the optimum may lie beyond, and the row may be better than shown" in warning
    assert warning in markdown(found, results, "c")


@pytest.mark.parametrize("search", ["rate-first", "grid"])
def test_the_edge_is_judged_in_either_search(tmp_path: Path, search: str) -> None:
    results = compared(plan(search=search, decay_factors="2,4,8"), tmp_path, ToyTrainer())
    (of_adamw, of_muon) = warnings(results)
    assert "adamw: the best weight decay 0.2 is the smallest of its grid, 0.0040 ahead of 0.4" in of_adamw
    assert of_muon.startswith("muon: the best weight decay 0.2")
    assert not warnings(compared(plan(search=search, decay_factors="0,1,2"), tmp_path / "more", ToyTrainer()))


def test_a_run_that_is_killed_resumes_in_the_same_call(tmp_path: Path) -> None:
    found, train, killed = plan(), ToyTrainer(), list[str]()

    def killed_once(config: RunConfig, log: Path) -> None:
        if not killed:
            killed.append(config.run.name)
            config.run_dir.mkdir(parents=True)
            (config.run_dir / "status.json").write_text('{"state": "running", "step": 3}')
            return
        train(config, log)

    work = runner(found, tmp_path, killed_once)
    work.run()
    assert train.trained[0] == killed[0]
    assert not warnings(summarise(found, work.outcomes, work.failed))


def test_beside_an_edge_may_be_what_failed(tmp_path: Path) -> None:
    train = ToyTrainer("muon-lr8e-06-wd0.1-seed7")
    lines = warnings(compared(plan(rates=("muon=1e-6,2e-6,4e-6,8e-6,1.6e-5",)), tmp_path, train))
    assert "muon: the best lr 1.6e-05 is the largest of its grid, and 8e-06 failed: the optimum" in lines[0]


def test_what_fails_ends_nothing_and_is_tried_again(tmp_path: Path) -> None:
    found, said = plan(), list[str]()
    bad = ["adamw-lr0.0012-wd0.1-seed7", "muon-lr0.0003-wd0.1-seed9"]
    results = compared(found, tmp_path, ToyTrainer(*bad), said)
    (line,) = [line for line in said if "seed 9: failed" in line]
    assert "error: the gradient of wte.weight is not finite; see" in line
    assert dict(results[0].trials)[Cell("adamw", 1.2e-3, 0.1, 7)] is None
    assert list(results[1].losses) == [8, 10]
    assert results[1].difference is not None
    assert results[1].difference.interval.count == 2
    assert warnings(results) == [
        "adamw: counted as worse than any other, since they have no loss: lr 0.0012, weight decay 0.1; see their logs",
        "muon: no result for seed 9; the next call tries again",
    ]
    assert verdict(found, results[1]) == "no verdict"  # of the seeds that were left it would be better
    again = ToyTrainer()
    assert not warnings(compared(found, tmp_path, again))
    assert again.trained == bad


def test_an_optimizer_whose_every_trial_fails_has_no_seeds(tmp_path: Path) -> None:
    found = plan(rate_factors="1,2")
    names = [f"muon-lr{lr}-wd0.1-seed7" for lr in ("0.0003", "0.0006")]
    results = compared(found, tmp_path, ToyTrainer(*names))
    assert (results[1].best, results[1].loss, results[1].difference) == (None, None, None)
    assert len(results[0].losses) == 3
    json.loads(as_json(found, results, "c"))


def test_a_folder_grows(tmp_path: Path) -> None:
    """More optimizers and seeds; nothing is trained twice."""
    compared(plan(), tmp_path, ToyTrainer())
    train = ToyTrainer()
    compared(plan("adamw,muon,lion", seeds=4), tmp_path, train)
    assert len(train.trained) == 7 + 4 + 2
    assert all("lion" in name or name.endswith("seed11") for name in train.trained)


def test_rows_of_larger_batches_go_by_the_search_at_the_batch_itself(tmp_path: Path) -> None:
    found, train = plan(None, batch_law=True, tokens=40_960), ToyTrainer()
    results = compared(found, tmp_path, train)
    assert len(train.trained) == 7 + 8 * 3
    assert {(result.best.rate, result.best.decay) for result in results if result.best} == {(3e-4, 0.1)}
    assert [result.trials == () for result in results] == [False, *[True] * 7]
    assert [verdict(found, result) for result in results[1:]] == ["not distinguishable"] * 7
    assert "- adamw 4B" not in markdown(found, results, "c")


def test_a_wish_to_stop_is_obeyed_between_runs(tmp_path: Path) -> None:
    train = ToyTrainer()
    work = runner(plan(), tmp_path, train, stopped=lambda: len(train.trained) == 5)
    with pytest.raises(StoppedError):
        work.run()
    rest = ToyTrainer()
    compared(plan(), tmp_path, rest)
    assert len(rest.trained) == 20 - 5


def test_machines_share_the_cells(tmp_path: Path) -> None:
    """What another has claimed is left to it, and waited for."""
    found, folder = plan(), ComparisonFolder(tmp_path)
    theirs = Cell("muon", 3e-4, 0.1, 7)
    ready, child = os.pipe(), 0
    child = os.fork()
    if not child:
        with claimed(folder.claim(theirs)) as mine:
            os.write(ready[1], b"1" if mine else b"0")
            time.sleep(0.5)
            other = runner(found, tmp_path, ToyTrainer())
            other._cell(theirs)
        os._exit(0)
    assert os.read(ready[0], 1) == b"1"
    said, train = list[str](), ToyTrainer()
    compared(found, tmp_path, train, said)
    os.waitpid(child, 0)
    assert theirs.name not in train.trained
    assert len(train.trained) == 19
    assert f"waiting for 1 runs that others have claimed, first {theirs}" in said


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    path, ready = tmp_path / "x.claim", os.pipe()
    child = os.fork()
    if not child:
        with claimed(path):
            os.write(ready[1], b"1")
            signal.pause()
    os.read(ready[0], 1)
    with claimed(path) as mine:
        assert not mine
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with claimed(path) as mine:
        assert mine
