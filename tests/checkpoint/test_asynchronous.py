"""Saves beside the training: what was there when they started is what they hold, and a disk may fail at any moment."""

import errno
from pathlib import Path

import pytest
import torch

from disttrain.checkpoint.manager import CheckpointManager
from disttrain.checkpoint.staging import Staging
from disttrain.errors import StorageError
from tests.checkpoint import toys
from tests.checkpoint.storages import GatedStorage, RefusingStorage
from tests.checkpoint.test_manager import names, small_state

JOBS = "tests.checkpoint.saving_jobs"


@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 3), ("hsdp", 4), ("ddp", 2)])
def test_what_is_saved_is_the_moment_of_the_start(pool, tmp_path, strategy, world):
    results = pool.run(f"{JOBS}:train_on_while_saving", world=world, directory=tmp_path, strategy=strategy)
    for _, seen in results:
        assert seen == [True, True, False, (), True]
    (loaded, step, _), *_ = pool.run("tests.checkpoint.jobs:load_latest", world=2, strategy="fsdp", directory=tmp_path)
    assert step == 4
    toys.assert_same(loaded, results[0][0])


def test_one_save_at_a_time_and_nobody_sees_it_before_it_is_whole(tmp_path):
    storage = GatedStorage(tmp_path)
    manager = CheckpointManager(storage, 2, "run-a", asynchronous=True)
    manager.start(small_state(1), **toys.about(1))
    with pytest.raises(RuntimeError, match="finish it before"):
        manager.start(small_state(2), **toys.about(2))
    assert manager.pending
    assert manager.busy
    assert manager.latest() is None
    storage.gate.set()
    saved = manager.finish()
    assert saved is not None
    assert (saved.step, saved.place, saved.problems) == (1, str(tmp_path / "step-00000001"), ())
    assert not manager.pending
    assert manager.finish() is None
    assert names(tmp_path) == ["step-00000001"]


def test_the_copies_live_from_save_to_save():
    staging = Staging(copy=True)

    def staged(state):
        return {box.key: box.read() for box in staging.stage(state).boxes}

    first = staged({"a": torch.ones(3), "b": torch.ones(2)})
    plan = staging._plan
    second = staged({"a": torch.zeros(3), "b": torch.zeros(2)})
    assert staging._plan is plan
    assert first["a"].data_ptr() == second["a"].data_ptr()
    assert second["a"].tolist() == [0, 0, 0]
    third = staged({"b": torch.ones(4)})
    assert staging._plan is not plan
    assert {key: value.tolist() for key, value in third.items()} == {"b": [1, 1, 1, 1]}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("operation", ["begin", "write", "commit"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_whatever_the_disk_refuses_the_older_checkpoint_stays(tmp_path, asynchronous, operation, code):
    toys.save(tmp_path, small_state(1), 1)
    storage = RefusingStorage(tmp_path, code, (operation,))
    manager = CheckpointManager(storage, 1, "run-a", asynchronous=asynchronous)
    with pytest.raises(StorageError) as caught:
        manager.save(small_state(2), **toys.about(2))
    (problem,) = caught.value.problems
    assert str(tmp_path) in problem
    assert "bytes free" in problem
    assert names(tmp_path) == ["step-00000001"]
    assert toys.manager(tmp_path).latest().manifest.step == 1
    manager.save(small_state(2), **toys.about(2))
    assert names(tmp_path) == ["step-00000002"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_of(tmp_path):
    toys.save(tmp_path, small_state(1), 1)
    manager = CheckpointManager(RefusingStorage(tmp_path, errno.EACCES, ("remove",)), 1, "run-a", asynchronous=True)
    manager.start(small_state(2), **toys.about(2))
    saved = manager.finish()
    assert saved is not None
    assert saved.problems == ()
    assert [note.split(":")[0] for note in saved.notes] == ["an old checkpoint stays"]
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_directory_removed_underneath(tmp_path):
    storage = GatedStorage(tmp_path / "run" / "checkpoints")
    manager = CheckpointManager(storage, 2, "run-a", asynchronous=True)
    manager.start(small_state(1), **toys.about(1))
    (attempt,) = storage.directory.iterdir()
    attempt.rmdir()
    storage.directory.rmdir()
    storage.directory.parent.rmdir()
    storage.gate.set()
    saved = manager.finish()
    assert saved is not None
    (problem,) = saved.problems
    assert "it was removed" in problem
    assert manager.save(small_state(2), **toys.about(2)) == str(storage.directory / "step-00000002")


def test_a_defect_is_no_storage_error(tmp_path):
    manager = toys.manager(tmp_path, asynchronous=True)
    manager.storage.write = lambda *args: 1 / 0
    manager.start(small_state(1), **toys.about(1))
    with pytest.raises(ZeroDivisionError):
        manager.finish()


def told(results) -> tuple[list[str], list[str]]:
    """What a run told and what ended it, the same on every rank but for its own waiting times."""
    assert all(result[1] == results[0][1] for result in results)
    return results[0]


def run(pool, directory: Path, storage: str, **settings) -> tuple[list[str], list[str]]:
    settings = {"steps": 6, "every": 2} | settings
    return told(pool.run(f"{JOBS}:run_with", world=3, directory=directory, storage=storage, **settings))


def test_a_save_that_is_due_waits_for_the_one_before(pool, tmp_path):
    lines, problems = run(pool, tmp_path, "gated", steps=4)
    assert lines[0].startswith("step 4: waited")
    assert "for the checkpoint of step 2 that was still being written" in lines[0]
    assert (lines[1:], problems) == (["saved 2", "saved 4"], [])


def test_a_disk_that_was_full_is_tried_again_soon(pool, tmp_path):
    lines, problems = run(pool, tmp_path, "full once", steps=8, every=4)
    assert "checkpoint of step 4 not saved: rank 1: " in lines[0]
    assert lines[0].endswith("(there is none yet); training goes on and tries again at step 6")
    assert (lines[1:], problems) == (["saved 6", "saved 8"], [])


def test_a_commit_that_failed_is_tried_again(pool, tmp_path):
    lines, problems = run(pool, tmp_path, "no commit", steps=4)
    assert "checkpoint of step 2 not saved: " in lines[0]
    assert (lines[1:], problems) == (["saved 4"], [])


@pytest.mark.parametrize(("storage", "tried"), [("full for ever", [2, 4]), ("read-only", [2, 3, 4, 5])])
def test_the_last_save_must_succeed(pool, tmp_path, storage, tried):
    lines, problems = run(pool, tmp_path, storage)
    assert [line.split(" not saved")[0] for line in lines] == [f"checkpoint of step {step}" for step in tried]
    assert len(problems) == 1
    assert problems[0].startswith("checkpoint of step 6 not saved: ")


def test_a_run_may_stop_at_the_first_failure(pool, tmp_path):
    toys.save(tmp_path, small_state(1), 1)
    lines, problems = run(pool, tmp_path, "full for ever", on_error="stop")
    assert lines == []
    assert problems[0].startswith("checkpoint of step 2 not saved: rank 1: ")
    assert problems[0].endswith("(step-00000001 stays the newest)")


def test_services_come_and_go(tmp_path):
    held = {"service.clip.history": torch.tensor([1.0, 2.0])}
    manager = toys.manager(tmp_path)
    manager.save(small_state(1) | held, **toys.about(1), extra={"wandb": {"id": "abc"}})
    info = manager.latest()
    assert info.manifest.extra == {"wandb": {"id": "abc"}}
    loaded = small_state(0) | {"service.clip.history": torch.zeros(2), "service.noise.scale": torch.full((), 7.0)}
    assert manager.load(loaded, info) == [f"service.noise.scale not in {info.place}: starts anew"]
    toys.assert_same(loaded, small_state(1) | held | {"service.noise.scale": torch.full((), 7.0)})
    assert manager.load(small_state(0), info) == [f"service.clip.history of {info.place}: no longer kept"]
    longer = small_state(0) | {"service.clip.history": torch.zeros(3)}
    assert manager.load(longer, info) == [f"service.clip.history not in {info.place}: starts anew"]
    toys.assert_same(longer, small_state(1) | {"service.clip.history": torch.zeros(3)})
