"""What happens on one rank is known on all of them."""

JOBS = "tests.checkpoint.jobs"


def test_full_disk_on_one_rank_is_one_error_everywhere(pool, tmp_path):
    pool.run(f"{JOBS}:save_step", world=3, strategy="fsdp", directory=tmp_path, step=1)
    results = pool.run(f"{JOBS}:save_with_full_disk", world=3, directory=tmp_path, broken_rank=1, step=2)
    assert results[0] == results[1] == results[2]
    (problem,) = results[0]
    assert "rank 1: " in problem
    assert "rank-00001.safetensors: cannot write: No space left on device" in problem
    assert "free space" in problem
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_full_disk_on_the_coordinator(pool, tmp_path):
    results = pool.run(f"{JOBS}:save_with_full_disk", world=2, directory=tmp_path, broken_rank=0, step=2)
    assert results[0] == results[1]
    assert "rank 0: " in results[0][0]
    assert list(tmp_path.iterdir()) == []


def test_damage_in_any_ranks_share_falls_back_on_all_ranks(pool, tmp_path):
    first = pool.run(f"{JOBS}:save_step", world=3, strategy="fsdp", directory=tmp_path, step=1)
    pool.run(f"{JOBS}:save_step", world=3, strategy="fsdp", directory=tmp_path, step=2)
    victim = tmp_path / "step-00000002" / "rank-00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-3] ^= 16
    victim.write_bytes(content)
    for state, step, rejected in pool.run(f"{JOBS}:load_latest", world=2, strategy="fsdp", directory=tmp_path):
        assert step == 1
        assert len(rejected) == 1
        assert "rank-00001.safetensors: crc32 is" in rejected[0]
        for name, tensor in first[0].items():
            assert state[name].equal(tensor), name


def test_mismatch_is_listed_on_all_ranks_before_anything_is_touched(pool, tmp_path):
    pool.run(f"{JOBS}:save_step", world=2, strategy="fsdp", directory=tmp_path, step=1)
    for problems, untouched in pool.run(f"{JOBS}:load_mismatched", world=2, directory=tmp_path):
        assert untouched
        text = "\n".join(problems)
        assert "model.extra: not in the checkpoint" in text
        assert "model.up.bias: in the checkpoint, but not asked for" in text


def test_agreement(pool):
    results = pool.run(f"{JOBS}:agree", world=3)
    for rank, (gathered, problem, kinds) in enumerate(results):
        assert gathered == [{"rank": r, "text": "é" * r} for r in range(3)]
        assert problem == "/somewhere: Permission denied"
        assert kinds == ["KeyError" if rank == 0 else "RuntimeError"]
