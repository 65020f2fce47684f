"""Saved at one layout, loaded at another: every parameter and every Adam moment has the same bits."""

import pytest
from safetensors import safe_open

from disttrain.checkpoint.manifest import read_manifest
from disttrain.checkpoint.reading import open_checkpoint
from disttrain.checkpoint.state import model_state, training_state
from tests.checkpoint import toys

JOBS = "tests.checkpoint.jobs"


@pytest.fixture(
    scope="module", params=[("fsdp", 4), ("ddp", 2), ("hsdp", 4)], ids=lambda saved: f"{saved[0]}{saved[1]}"
)
def saved(request, pool, tmp_path_factory):
    """A checkpoint of step 3 and the whole tensors that went into it."""
    strategy, world = request.param
    directory = tmp_path_factory.mktemp("checkpoints")
    results = pool.run(f"{JOBS}:save_step", world=world, strategy=strategy, directory=directory, step=3)
    return directory, results[0]


@pytest.mark.parametrize(
    ("strategy", "world"), [("fsdp", 4), ("fsdp", 3), ("fsdp", 2), ("fsdp", 1), ("ddp", 2), ("hsdp", 4)]
)
def test_loads_at_other_layouts(pool, saved, strategy, world):
    directory, expected = saved
    for state, step, rejected in pool.run(f"{JOBS}:load_latest", world=world, strategy=strategy, directory=directory):
        assert (step, rejected) == (3, [])
        toys.assert_same(state, expected)


def test_loads_in_one_process_without_a_group(saved):
    directory, expected = saved
    state = training_state(*toys.build("plain", seed=99))
    with toys.no_pickle():
        info = toys.manager(directory).latest()
        toys.manager(directory).load(state, info)
    toys.assert_same(state, expected)


def test_loads_weights_alone(saved):
    directory, expected = saved
    model, _ = toys.build("plain", seed=99)
    reader, info = open_checkpoint(directory / "step-00000003")
    reader.load_weights(model, info)
    toys.assert_same(model_state(model), {k: v for k, v in expected.items() if k.startswith("model.")})


def test_loads_weights_alone_into_shards(pool, saved):
    directory, expected = saved
    results = pool.run(f"{JOBS}:weights_only", world=2, strategy="fsdp", directory=directory / "step-00000003")
    for state in results:
        toys.assert_same(state, {k: v for k, v in expected.items() if k.startswith("model.")})


def test_one_process_saves_what_ranks_load(pool, tmp_path):
    state = training_state(*toys.build("plain", seed=5))
    with toys.no_pickle():
        toys.save(tmp_path, state, step=5)
    for loaded, step, _ in pool.run(f"{JOBS}:load_latest", world=4, strategy="fsdp", directory=tmp_path):
        assert step == 5
        toys.assert_same(loaded, toys.full(state))


def test_empty_shards_take_no_bytes_and_ties_are_stored_once(pool, tmp_path):
    pool.run(f"{JOBS}:save_step", world=4, strategy="fsdp", directory=tmp_path, step=1)
    manifest = read_manifest(tmp_path / "step-00000001")
    rows = [chunk.sizes[0] for chunk in manifest.tensors["model.up.weight"].chunks]
    assert rows == [1, 1, 1]
    assert [chunk.sizes[0] for chunk in manifest.tensors["model.embedding.weight"].chunks] == [2, 2, 2, 1]
    for entry in manifest.files:
        with safe_open(tmp_path / "step-00000001" / entry.name, framework="pt") as file:
            chunks = [chunk for tensor in manifest.tensors.values() for chunk in tensor.chunks]
            assert sorted(file.keys()) == sorted(chunk.key for chunk in chunks if chunk.file == entry.name)
    assert "model.head.weight" not in manifest.tensors
    assert "model.scale" in manifest.tensors
    assert "model.scratch" not in manifest.tensors
    assert (manifest.world_size, manifest.samples, manifest.tokens) == (4, 8, 64)
