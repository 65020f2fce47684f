"""What is refused, and what is only noted, before a process is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from disttrain.checkpoint.manifest import Manifest, step_directory, write_manifest
from disttrain.config.load import load_config
from disttrain.errors import UserError
from disttrain.train.folder import RunFolder
from disttrain.train.preflight import PreparedRun, is_complete, prepare_run

TOML = """
[model]
n_layers = 1
d_model = 16
n_heads = 2
[data]
path = "{folder}/text.txt"
tokenizer = "bytes"
cache_dir = "{folder}/cache"
[train]
steps = 10
global_batch_tokens = 64
sequence_length = 16
[schedule]
warmup_steps = 2
[run]
dir = "{folder}/run"
"""
Prepare = Callable[..., PreparedRun]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    file = tmp_path / "run.toml"
    file.write_text(TOML.format(folder=tmp_path))
    return lambda *overrides: prepare_run(load_config(file, list(overrides)).config)


def commit(run: PreparedRun, step: int) -> Path:
    """A checkpoint of that step without any tensors."""
    directory = step_directory(run.folder.checkpoints, step)
    directory.mkdir(parents=True)
    config = run.config.model_dump(mode="json")
    about = {"run_id": run.run_id, "strategy": "fsdp", "config": config, "data": run.data.identity, "versions": {}}
    numbers = {"step": step, "samples": 4 * step, "tokens": 64 * step, "world_size": 1}
    write_manifest(directory, Manifest(files=(), tensors={}, **numbers, **about))  # type: ignore[arg-type]
    return directory


def problems(prepare: Prepare, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        prepare(*overrides)
    return caught.value.problems


def test_the_vocabulary_is_the_tokenizers(prepare: Prepare) -> None:
    assert prepare().config.model.vocab_size == 257
    assert prepare("model.vocab_size=512").config.model.vocab_size == 512
    [line] = problems(prepare, "model.vocab_size=256")
    assert line.startswith("model.vocab_size = 256 is smaller than the tokenizer's 257 entries")


def test_token_files_need_a_vocabulary(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    (np.arange(4000) % 50).astype("<u2").tofile(path)
    [line] = problems(prepare, f"data.path={path}")
    assert f"data.path = {path}" in line
    assert "set model.vocab_size" in line
    assert prepare(f"data.path={path}", "model.vocab_size=50").config.model.vocab_size == 50
    [line] = problems(prepare, f"data.path={path}", "model.vocab_size=49")
    assert "holds token 49, but the vocabulary ends at 49 - 1 = 48" in line


def test_both_sets_must_have_a_sample(prepare: Prepare) -> None:
    lines = problems(prepare, "train.sequence_length=100000", "train.global_batch_tokens=400000")
    assert [line.split(":")[0] for line in lines] == ["training set", "validation set"]


def test_a_new_run_has_no_notes(prepare: Prepare) -> None:
    assert prepare().notes == ()
    assert prepare("run.resume=never").notes == ()
    [line] = problems(prepare, "run.resume=must")
    assert line.startswith('run.resume = "must", but ')


def test_a_warmup_that_never_ends_is_noted(prepare: Prepare) -> None:
    (note,) = prepare("schedule.warmup_steps=10").notes
    assert "warm-up of 640 tokens" in note
    assert "only rises" in note


def test_the_same_run_again(prepare: Prepare) -> None:
    commit(prepare(), 5)
    for resume in ("auto", "must"):
        assert prepare(f"run.resume={resume}").notes == ()
    [line] = problems(prepare, "run.resume=never")
    assert "holds step-00000005" in line


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.d_model=32", "model.d_model was 16, is 32"),
        ("model.n_kv_heads=1", "model.n_kv_heads was not set, is 1"),
        ("model.vocab_size=300", "model.vocab_size was 257, is 300"),
        ("train.seed=3", "train.seed was 0, is 3"),
        ("train.sequence_length=8", "train.sequence_length was 16, is 8"),
        ("data.validation_fraction=0.2", "data: fingerprint was "),
    ],
)
def test_another_run_is_refused(override: str, line: str, prepare: Prepare) -> None:
    commit(prepare(), 5)
    first, *_, remedy = problems(prepare, override, "train.microbatch_size=1")
    assert first.startswith(line)
    assert "holds step 5 of another run: undo the change or set another run.name" in remedy


def test_every_difference_is_a_line(prepare: Prepare, tmp_path: Path) -> None:
    commit(prepare(), 5)
    (tmp_path / "text.txt").write_text("".join(f"LINE {i}\n" for i in range(1000)))
    lines = problems(prepare, "model.d_model=32", "model.bias=false", "optim.lr=1e-2")
    assert lines[:2] == ("model.d_model was 16, is 32", "model.bias was True, is False")
    assert lines[2].startswith("data: fingerprint was ")
    assert len(lines) == 4


def test_harmless_changes_are_noted(prepare: Prepare) -> None:
    commit(prepare(), 5)
    run = prepare("train.steps=20", "optim.betas=[0.5, 0.95]", "parallel.strategy=ddp")
    assert run.notes == (
        "changed since step 5: train.steps was 10, is 20",
        "changed since step 5: parallel.strategy was 'fsdp', is 'ddp'",
        "changed since step 5: optim.betas was not set, is [0.5, 0.95]",
    )


def test_what_says_nothing_about_the_result_is_not_noted(prepare: Prepare, tmp_path: Path) -> None:
    commit(prepare(), 5)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "elsewhere/text.txt")
    moved = (f"data.path={tmp_path}/elsewhere/text.txt", f"data.cache_dir={tmp_path}/other")
    assert prepare("run.name=other", "monitor.log_every=1", *moved).notes == ()


def test_behind_a_damaged_checkpoint_the_one_before_counts(prepare: Prepare) -> None:
    commit(prepare(), 5)
    newest = commit(prepare(), 6)
    (newest / "manifest.json").write_text("{")
    assert prepare().notes == ()
    *_, remedy = problems(prepare, "model.d_model=32")
    assert "holds step 5 of another run" in remedy
    (step_directory(newest.parent, 5) / "manifest.json").write_text("{")
    assert prepare("model.d_model=32").notes == ()  # the manager refuses, with the reasons


def test_the_run_id_outlives_harmless_changes(prepare: Prepare) -> None:
    same = {
        prepare(*overrides).run_id for overrides in ([], ["train.steps=20"], ["optim.lr=1"], ["model.vocab_size=257"])
    }
    assert len(same) == 1
    others = {
        prepare(override).run_id for override in ("train.seed=1", "model.d_model=32", "data.validation_fraction=0.2")
    }
    assert len(others | same) == 4


def test_when_a_run_is_complete(prepare: Prepare) -> None:
    folder: RunFolder = prepare().folder
    folder.path.mkdir()
    assert not is_complete(prepare().config)
    for state, step, complete in (("completed", 10, True), ("preempted", 10, False), ("completed", 9, False)):
        folder.write_status(state, step)  # type: ignore[arg-type]
        assert is_complete(prepare().config) == complete
    folder.write_status("completed", 10)
    assert is_complete(prepare("train.steps=8").config)
    assert not is_complete(prepare("train.steps=11").config)
    assert not is_complete(prepare("run.resume=never").config)
