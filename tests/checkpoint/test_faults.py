"""A handful of every fault of `benchmarks/faults.py`: what is harmed is named, and the older checkpoint's bits come."""

import pickle
import random

import pytest

from disttrain.testing import JobError, checkpoints, faults
from disttrain.testing.checkpoints import FELL_BACK, LARGE_ROWS, NEWER, OLDER, OTHER_RUN, SMALL_ROWS, TOOK_NEWER
from disttrain.testing.hostile import HOSTILE, MARKER, MAY_GO_UNSAID

JOBS = "disttrain.testing.checkpoints"


class Pair:
    """Two steps of a run that four ranks saved; `after` does damage, tells what a load does, and puts all back."""

    def __init__(self, directory):
        self.directory = directory
        self.older, self.newer = (directory / f"step-{step:08d}" for step in (OLDER, NEWER))
        self.shards = sorted(self.newer.glob("*.safetensors"))

    def after(self, damage, *arguments, silent=False) -> str:
        with faults.damaged(self.newer):
            damage(*arguments)
            return checkpoints.outcome(self.directory, SMALL_ROWS, silent)


@pytest.fixture(scope="module")
def pair(pool, tmp_path_factory) -> Pair:
    directory = tmp_path_factory.mktemp("pair")
    pool.run(f"{JOBS}:save_pair", world=4, directory=directory, rows=SMALL_ROWS)
    return Pair(directory)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


def test_without_damage_the_newer_one_is_taken(pair):
    assert len(pair.shards) == 4
    assert pair.after(lambda: None) == TOOK_NEWER


def test_flipped_bits_in_fields_and_data(pair, rng):
    bits = faults.covering_bits(pair.newer, rng)
    assert len({path for path, _ in bits}) == 5
    bits = bits[:30] + [faults.random_bit(pair.newer, rng) for _ in range(10)]
    assert {(path.name, bit): pair.after(faults.flip_bit, path, bit) for path, bit in bits} == {
        (path.name, bit): FELL_BACK for path, bit in bits
    }


def test_zeroed_pages(pair):
    for path in pair.shards:
        page = faults.pages_with_data(path)[-1]
        assert pair.after(faults.zero_page, path, page) == FELL_BACK


def test_truncated_files(pair):
    for path in pair.shards:
        for size in (0, 7, path.stat().st_size - 1):
            assert pair.after(faults.truncate, path, size) == FELL_BACK
    assert pair.after(faults.truncate, pair.newer / faults.MANIFEST, 100) == FELL_BACK


def test_files_of_another_step_or_run_even_when_the_manifest_agrees(pair, pool, tmp_path):
    pool.run(f"{JOBS}:save_pair", world=4, directory=tmp_path, rows=SMALL_ROWS, run_id=OTHER_RUN)

    def swap_and_sign(path, donor) -> None:
        faults.replace(path, donor)
        faults.resign_file(path)

    for donor in (pair.older, tmp_path / pair.newer.name):
        path = pair.shards[2]
        assert pair.after(faults.replace, path, donor / path.name) == FELL_BACK
        assert pair.after(swap_and_sign, path, donor / path.name) == FELL_BACK


def test_missing_files(pair):
    assert pair.after(faults.remove, pair.shards[3]) == FELL_BACK
    assert pair.after(faults.remove, pair.newer / faults.MANIFEST, silent=True) == FELL_BACK


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_and_nothing_of_them_runs(pair, tmp_path, what):
    def make() -> None:
        try:
            HOSTILE[what](pair.newer, tmp_path)
        except PermissionError:
            pytest.skip("not permitted here")

    assert pair.after(make, silent=what in MAY_GO_UNSAID) == FELL_BACK
    assert not (tmp_path / MARKER).exists()


def test_the_hostile_pickles_would_run(pair, tmp_path):
    with faults.damaged(pair.newer):
        HOSTILE["a pickle as data"](pair.newer, tmp_path)
        pickle.loads(pair.shards[0].read_bytes())
    assert (tmp_path / MARKER).exists()


def test_the_judge_can_find_fault(pair):
    manifest, shard = pair.newer / faults.MANIFEST, pair.shards[0]
    assert pair.after(faults.remove, manifest) == "fell back without a word"
    assert pair.after(faults.resign, pair.newer, lambda content: content.update(tokens=1)) == TOOK_NEWER
    with faults.damaged(pair.older):
        faults.remove(pair.older / faults.MANIFEST)
        assert "no checkpoint here can be loaded" in pair.after(faults.flip_bit, shard, 9)

    def other_numbers() -> None:
        content = bytearray(shard.read_bytes())
        content[-64:] = bytes(64)
        shard.write_bytes(content)
        faults.resign_file(shard)

    assert pair.after(other_numbers) == "other bits than those of step 2"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in the training", "beside the training"])
def test_kill_in_a_save(pool, tmp_path, asynchronous):
    directory, log = tmp_path / "checkpoints", tmp_path / "log"
    settings = {"directory": directory, "log": log, "asynchronous": asynchronous, "die": 0.05}
    with pytest.raises(JobError, match="was killed by SIGKILL"):
        pool.run(f"{JOBS}:save_until_killed", world=2, **settings)
    assert len(checkpoints.commits(log)) >= 2
    problem, _ = checkpoints.after_kill(directory, log)
    assert problem == ""


def test_what_a_kill_may_not_leave_is_found(pool, tmp_path):
    pool.run(f"{JOBS}:save_pair", world=2, directory=tmp_path / "c", rows=SMALL_ROWS)
    log = tmp_path / "log"
    log.write_text("1\n2\n3\n4")
    assert checkpoints.commits(log) == [1, 2, 3]
    assert "committed [3], found" in checkpoints.after_kill(tmp_path / "c", log)[0]
    (tmp_path / "c" / "step-00000003").mkdir()
    assert "step-00000003" in checkpoints.after_kill(tmp_path / "c", log)[0]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in the training", "beside the training"])
def test_full_disk(pool, asynchronous):
    settings = {"rows": LARGE_ROWS, "keep_last": 1, "asynchronous": asynchronous}
    try:
        with checkpoints.small_disk(4 * 2**20) as disk:
            assert pool.run(f"{JOBS}:save_step", world=2, directory=disk, step=OLDER, **settings) == [(), ()]
            [[problem], same] = pool.run(f"{JOBS}:save_step", world=2, directory=disk, step=NEWER, **settings)
            assert same == (problem,)
            assert "bytes written; 0 bytes free" in problem
            assert [path.name for path in disk.iterdir()] == ["step-00000001"]
            found = checkpoints.manager(disk).latest()
            assert found is not None
            assert (found.manifest.step, found.rejected) == (OLDER, ())
    except PermissionError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    assert not disk.exists()
