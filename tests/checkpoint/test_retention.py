"""What is deleted, and what never is."""

import shutil

from tests.checkpoint import toys
from tests.checkpoint.test_manager import data_file, names, small_state, truncate


def kept(directory) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(directory)]


def test_every_so_many_steps_one_stays(tmp_path):
    manager = toys.manager(tmp_path, 2, keep_every=3)
    for step in range(1, 9):
        manager.save(small_state(step), **toys.about(step))
    assert kept(tmp_path) == [3, 6, 7, 8]


def test_torn_and_damaged_ones_never_count(tmp_path):
    for step in (1, 2, 3, 4):
        toys.save(tmp_path, small_state(step), step)
    truncate(data_file(tmp_path, 4))
    (tmp_path / "step-00000003" / "manifest.json").write_text("{")
    toys.save(tmp_path, small_state(5), 5, keep_last=2)
    assert kept(tmp_path) == [2, 3, 4, 5]
    toys.save(tmp_path, small_state(6), 6, keep_last=2)
    assert kept(tmp_path) == [5, 6]


def test_the_last_one_that_was_verified_stays_until_a_newer_one_was(tmp_path):
    toys.save(tmp_path, small_state(1), 1)
    resumed = toys.manager(tmp_path, 1)
    assert resumed.latest().manifest.step == 1
    for step in (2, 3):
        resumed.save(small_state(step), **toys.about(step))
    assert kept(tmp_path) == [1, 3]
    again = toys.manager(tmp_path, 1)
    assert again.latest().manifest.step == 3
    again.save(small_state(4), **toys.about(4))
    assert kept(tmp_path) == [3, 4]


def test_a_deletion_that_was_cut_short_is_finished_later(tmp_path):
    toys.save(tmp_path, small_state(1), 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009.tmp-deleted")
    (tmp_path / "step-00000009.tmp-deleted" / "rank-00000.safetensors").unlink()
    assert toys.manager(tmp_path).latest().manifest.step == 1
    toys.save(tmp_path, small_state(2), 2)
    assert kept(tmp_path) == [1, 2]
