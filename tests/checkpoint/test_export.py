"""The weights as one file: the same bits at every layout, verified first, and nothing half-written."""

import errno
import json
from collections import namedtuple
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from disttrain.checkpoint import export
from disttrain.checkpoint.export import DamagedCheckpointError, export_weights
from disttrain.checkpoint.state import training_state
from disttrain.errors import StorageError, UserError
from tests.checkpoint import toys

WEIGHTS = {
    "model.half": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
    "model.scalar": torch.tensor(2.5),
    "model.empty": torch.empty(0, 3),
    "model.mask": torch.tensor([True, False]),
    "model.large": torch.tensor([[1e5, 3.0], [float("inf"), -1e5]]),
}


def saved(directory: Path, state: dict[str, torch.Tensor]) -> Path:
    toys.save(directory, {**state, "optim.x.step": torch.tensor(1.0)}, 1)
    return directory / "step-00000001"


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 4), ("hsdp", 4), ("ddp", 2)])
def test_ranks_save_and_one_file_has_the_same_bits(pool, tmp_path, strategy, world):
    job = {"strategy": strategy, "directory": tmp_path, "step": 3}
    expected = pool.run("tests.checkpoint.jobs:save_step", world=world, **job)[0]
    with toys.no_pickle():
        done = export_weights(tmp_path / "step-00000003", tmp_path / "out.safetensors")
    weights = {k.removeprefix("model."): v for k, v in expected.items() if k.startswith("model.")}
    loaded = load_file(done.path)
    toys.assert_same(loaded, weights)
    assert (done.run_id, done.step, done.tensors) == ("run-a", 3, len(weights))
    assert done.parameters == sum(tensor.numel() for tensor in weights.values())
    assert done.bytes == done.path.stat().st_size
    model = toys.Toy()
    assert model.load_state_dict(loaded, strict=False) == (["head.weight"], [])
    assert torch.equal(model.head.weight, weights["embedding.weight"])


def test_the_header_says_what_it_is(tmp_path):
    done = export_weights(saved(tmp_path, WEIGHTS), tmp_path / "out.safetensors")
    with safe_open(done.path, framework="pt") as file:
        about = file.metadata()
    assert json.loads(about.pop("config")) == {"model": {"width": 6, "eps": 1e-8}}
    assert about == {"format": "pt", "run_id": "run-a", "step": "1"}


def test_as_stored_or_as_one_dtype(tmp_path):
    directory, out = saved(tmp_path, WEIGHTS), tmp_path / "out.safetensors"
    plain = {name.removeprefix("model."): tensor for name, tensor in WEIGHTS.items()}
    export_weights(directory, out)
    toys.assert_same(load_file(out), plain)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        export_weights(directory, out, dtype, overwrite=True)
        toys.assert_same(load_file(out), {k: v.to(dtype) if v.is_floating_point() else v for k, v in plain.items()})


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"model.large: 2 values are beyond 65504, the largest float16; use a wider"):
        export_weights(saved(tmp_path / "c", WEIGHTS), out, torch.float16)
    assert names(tmp_path) == ["c"]


def test_tensors_stream(tmp_path):
    directory = saved(tmp_path, {f"model.{i}": torch.full((50,), float(i)) for i in range(6)})
    storages: list[StorageWeakRef] = []
    alive: list[int] = []
    whole = export._Source.whole

    def watched(*arguments):
        alive.append(sum(not storage.expired() for storage in storages))
        tensor = whole(*arguments)
        storages.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    with patch.object(export._Source, "whole", watched):
        export_weights(directory, tmp_path / "out.safetensors")
    assert len(alive) == 6
    assert max(alive) == 0


def test_damage_is_found_before_anything_is_written(tmp_path):
    directory = saved(tmp_path / "c", WEIGHTS)
    file = directory / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with patch.object(export, "write_safetensors") as write, pytest.raises(DamagedCheckpointError, match="crc32"):
        export_weights(directory, tmp_path / "out.safetensors")
    write.assert_not_called()
    (directory / "manifest.json").write_text("{")
    with pytest.raises(DamagedCheckpointError, match="not valid JSON"):
        export_weights(directory, tmp_path / "out.safetensors")
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("c", "is a directory"),
        ("there.safetensors", "exists \\(3 bytes\\); use another name, or --force"),
        ("nowhere/out.safetensors", "there is no directory .*nowhere; make it"),
        ("c/step-00000001/out.safetensors", "lies inside a checkpoint"),
        ("x" * 300, "File name too long"),
    ],
)
def test_targets_that_are_refused(tmp_path, name, words):
    directory = saved(tmp_path / "c", WEIGHTS)
    (tmp_path / "there.safetensors").write_text("old")
    with pytest.raises(UserError, match=words):
        export_weights(directory, tmp_path / name)
    assert (tmp_path / "there.safetensors").read_text() == "old"


def test_a_checkpoint_without_weights(tmp_path):
    with pytest.raises(UserError, match="no tensor of its 1 is a weight"):
        export_weights(saved(tmp_path, {}), tmp_path / "out.safetensors")


def test_a_disk_without_room_is_noticed_before_writing(tmp_path):
    disk = namedtuple("Disk", "free")
    directory = saved(tmp_path / "c", WEIGHTS)
    with (
        patch("shutil.disk_usage", return_value=disk(20)),
        pytest.raises(StorageError, match="26 bytes needed, 20 bytes free; free space"),
    ):
        export_weights(directory, tmp_path / "out.safetensors")


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path):
    directory, out = saved(tmp_path / "c", WEIGHTS), tmp_path / "out.safetensors"
    out.write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch("os.fsync", side_effect=full), pytest.raises(StorageError, match=r"bytes written.* bytes free"):
        export_weights(directory, out, overwrite=True)
    assert out.read_text() == "old"
    assert sorted(names(tmp_path)) == ["c", "out.safetensors"]


def test_a_plain_save_loads_into_the_model(tmp_path):
    model, optimizer = toys.build("plain", seed=5)
    toys.save(tmp_path, training_state(model, optimizer), 5)
    done = export_weights(tmp_path / "step-00000005", tmp_path / "out.safetensors")
    other, _ = toys.build("plain", seed=6)
    other.load_state_dict(load_file(done.path), strict=False)
    tokens = torch.arange(7)
    assert torch.equal(other(tokens), model(tokens))
