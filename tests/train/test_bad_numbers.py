"""Numbers gone bad in real runs on gloo ranks: that step is left out on all ranks, and nothing else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from disttrain.testing import RankPool
from disttrain.testing.bad_numbers import Fault

JOB = "disttrain.testing.bad_numbers:spoilt_run"
JUDGE = ("resilience.anomaly.warmup_steps=8", "resilience.anomaly.window_steps=16")
BAD = 20


def trained(
    pool: RankPool, config: Path, folder: Path, *faults: Fault, world: int = 2, settings: tuple[str, ...] = ()
) -> list[tuple[str, list[str]]]:
    overrides = (f"run.dir={folder}", "checkpoint.every=10", "monitor.noise_scale_every=1", *JUDGE, *settings)
    return pool.run(JOB, world, 120.0, config=str(config), overrides=overrides, faults=faults)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(folder, "events.jsonl") if event["kind"] == kind]


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in lines(folder, "metrics.jsonl") if "loss" in row}


@pytest.mark.parametrize(
    ("strategy", "where", "value"),
    [
        *itertools.product(["fsdp"], ["loss", "gradient"], ["nan", "inf", "spike"]),
        *itertools.product(["ddp", "hsdp"], ["gradient"], ["nan", "spike"]),
    ],
)
def test_one_step_is_left_out(
    pool: RankPool, config: Path, tmp_path: Path, strategy: str, where: Any, value: Any
) -> None:
    world = 4 if strategy == "hsdp" else 2
    settings = (f"parallel.strategy={strategy}", "optim.clip={kind='adaptive',warmup_steps=4}", "train.steps=30")
    if strategy == "hsdp":
        settings += ("parallel.dp_replicate=2", "train.microbatch_size=1")
    ended = trained(pool, config, tmp_path, Fault(BAD, 1, where, value), world=world, settings=settings)
    assert ended == [("completed", [])] * world
    (skipped,) = events(tmp_path, "skipped")
    assert skipped["step"] == BAD
    assert skipped["text"].startswith(f"step {BAD} left out: ")
    assert skipped["text"].endswith("samples 152 to 159")  # eight in each step
    assert ("the loss is not finite on rank 1" in skipped["text"]) == (where == "loss" and value != "spike")
    if value != "spike":
        assert "the gradient of " in skipped["text"]
    logged = rows(tmp_path)
    assert list(logged) == list(range(1, 31))
    assert [step for step, row in logged.items() if row["skipped_steps"]] == [BAD]
    # No weight was moved in that step, and in every other one all were.
    assert [step for step, row in logged.items() if row["update_rms/decay"] == 0] == [BAD]
    # What comes after is as calm as before: nothing of it has entered any history.
    for key in ("loss", "grad_norm", "noise_scale_tokens", "unit_threshold/decay.mlp.0"):
        found = [float(row[key]) for row in logged.values() if key in row and row["step"] > BAD]
        assert all(abs(number) < 1e3 or key == "noise_scale_tokens" for number in found), key
        assert all(number == number for number in found), key


def test_a_run_without_faults_has_no_bad_steps(pool: RankPool, config: Path, tmp_path: Path) -> None:
    assert trained(pool, config, tmp_path, settings=("train.steps=60",)) == [("completed", [])] * 2
    assert not events(tmp_path, "skipped")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_lost_comes_back_from_the_checkpoint(
    pool: RankPool, config: Path, tmp_path: Path, value: Any
) -> None:
    """At once: leaving out steps would not help. The data seen since are not seen again."""
    assert trained(pool, config, tmp_path, Fault(26, 1, "parameter", value)) == [("completed", [])] * 2
    assert [event["step"] for event in events(tmp_path, "skipped")] == [26]
    (rollback,) = events(tmp_path, "rollback")
    assert rollback["text"].startswith("rolled back from step 26 to 20: the gradient of ")
    assert rollback["text"].endswith("the run goes on with sample 208, behind all that it has seen")
    logged = rows(tmp_path)
    assert list(logged) == list(range(1, 41))
    assert all(row["tokens"] == 256 * step for step, row in logged.items())
    manifest = json.loads((tmp_path / "checkpoints/step-00000040/manifest.json").read_text())
    assert (manifest["samples"], manifest["tokens"]) == (8 * 46, 256 * 40)
    assert manifest["extra"]["anomaly"] == {"rollbacks": 1, "in_row": 0}
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["lost_seconds"]["rolled_back"] > 0


def test_a_weight_far_off_is_skipped_and_then_comes_back(pool: RankPool, config: Path, tmp_path: Path) -> None:
    settings = ("resilience.anomaly.max_skips=2",)
    ended = trained(pool, config, tmp_path, Fault(26, 0, "parameter", "spike"), settings=settings)
    assert ended == [("completed", [])] * 2
    assert [event["step"] for event in events(tmp_path, "skipped")] == [26, 27, 28]
    assert [event["text"].split(":")[0] for event in events(tmp_path, "rollback")] == ["rolled back from step 28 to 20"]


def test_the_budget_ends(pool: RankPool, config: Path, tmp_path: Path) -> None:
    faults = [Fault(step, 1, "loss", "nan") for step in range(15, 200)]
    settings = ("resilience.anomaly.max_skips=1", "resilience.anomaly.max_rollbacks=2")
    ended = trained(pool, config, tmp_path, *faults, settings=settings)
    assert ended[0] == ended[1]
    state, (problem,) = ended[0]
    assert state == "failed"
    # 15 and 16 bad, back to 10, 11 and 12 bad, back, and 11 and 12 bad again.
    assert problem.startswith("step 12: the gradient of ")
    assert "the loss is not finite on rank 1" in problem
    assert "2 bad steps in a row, and the run has rolled back 2 times already" in problem
    assert [event["text"].split(":")[0] for event in events(tmp_path, "rollback")] == [
        "rolled back from step 16 to 10",
        "rolled back from step 12 to 10",
    ]
    assert len(events(tmp_path, "failed")) == 1


def test_nowhere_to_go(pool: RankPool, config: Path, tmp_path: Path) -> None:
    faults = [Fault(step, 0, "gradient", "inf") for step in range(3, 100)]
    state, (problem,) = trained(pool, config, tmp_path, *faults, settings=("resilience.anomaly.max_skips=3",))[0]
    assert state == "failed"
    assert "4 bad steps in a row, and there is no checkpoint from before step 3 to roll back to" in problem


def test_a_row_that_a_resume_falls_into(pool: RankPool, config: Path, tmp_path: Path) -> None:
    """It goes back to before its first step, and no checkpoint is lost in vain."""
    faults = [Fault(step, 1, "loss", "nan") for step in (19, 20)]
    assert trained(pool, config, tmp_path, *faults, settings=("train.steps=20",)) == [("completed", [])] * 2
    manifest = json.loads((tmp_path / "checkpoints/step-00000020/manifest.json").read_text())
    assert manifest["extra"]["anomaly"] == {"rollbacks": 0, "in_row": 2, "first_bad": 19}
    faults = [Fault(step, 1, "loss", "nan") for step in (1, 2, 3)]
    assert trained(pool, config, tmp_path, *faults) == [("completed", [])] * 2
    assert [event["text"].split(":")[0] for event in events(tmp_path, "rollback")] == ["rolled back from step 23 to 10"]
    assert list(rows(tmp_path)) == list(range(1, 41))


def test_what_could_be_gone_back_to_is_not_deleted(pool: RankPool, config: Path, tmp_path: Path) -> None:
    """One checkpoint is kept, and a periodic save would fall into the row: it is not made."""
    faults = [Fault(step, 1, "loss", "nan") for step in range(19, 200)]
    settings = ("checkpoint.keep_last=1", "resilience.anomaly.max_rollbacks=1")
    state, (problem,) = trained(pool, config, tmp_path, *faults, settings=settings)[0]
    assert state == "failed"
    assert "has rolled back 1 times already" in problem
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000010"]


def test_another_window_begins_anew(pool: RankPool, config: Path, tmp_path: Path) -> None:
    trained(pool, config, tmp_path, settings=("train.steps=20",))
    assert trained(pool, config, tmp_path, settings=("resilience.anomaly.window_steps=9",)) == [("completed", [])] * 2


def test_a_resumed_run_decides_alike(pool: RankPool, config: Path, tmp_path: Path) -> None:
    """The history is in the checkpoint: a spike right after a resume is found, by the same window."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    trained(pool, config, whole, Fault(22, 1, "loss", "spike"), settings=("train.steps=30",))
    trained(pool, config, parted, settings=("train.steps=20",))
    trained(pool, config, parted, Fault(2, 1, "loss", "spike"), settings=("train.steps=30",))
    assert [event["step"] for event in events(parted, "skipped")] == [22]
    assert {step: row["loss"] for step, row in rows(parted).items()} == {
        step: row["loss"] for step, row in rows(whole).items()
    }


def test_spikes_may_be_let_through(pool: RankPool, config: Path, tmp_path: Path) -> None:
    settings = ("resilience.anomaly.spikes=false", "train.steps=30")
    faults = (Fault(BAD, 1, "loss", "spike"), Fault(BAD + 2, 1, "loss", "nan"))
    trained(pool, config, tmp_path, *faults, settings=settings)
    assert [event["step"] for event in events(tmp_path, "skipped")] == [BAD + 2]
