"""Commit, fallback, retention and refusal, in one process."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from disttrain.checkpoint import local
from disttrain.checkpoint.manifest import read_manifest
from disttrain.checkpoint.state import training_state
from disttrain.errors import UserError
from tests.checkpoint import toys


def small_state(step: int = 0) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3, 2), float(step)), "optim.weight.step": torch.tensor(float(step))}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def data_file(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}" / "rank-00000.safetensors"


def remove_file(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def change_manifest(path: Path) -> None:
    manifest = path.parent / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"tokens":128', '"tokens":129'))
    assert manifest.read_text() != text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: flip_bit(path, -1), "crc32 is"),
        (lambda path: flip_bit(path, 20), "crc32 is"),
        (truncate, "(-5)"),
        (remove_file, "cannot read: No such file"),
        (change_manifest, "the manifest was changed"),
        (lambda path: (path.parent / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda path: shutil.copy(path.parent.parent / "step-00000001" / path.name, path), "crc32 is"),
    ],
    ids=[
        "bit in data",
        "bit in header",
        "truncated",
        "missing",
        "manifest field",
        "manifest torn",
        "other step's file",
    ],
)
def test_damage_is_named_and_the_older_checkpoint_is_used(tmp_path, damage, words):
    for step in (1, 2):
        toys.save(tmp_path, small_state(step), step)
    damage(data_file(tmp_path, 2))
    info = toys.manager(tmp_path).latest()
    assert info.manifest.step == 1
    assert len(info.rejected) == 1
    assert words in info.rejected[0]
    assert "step-00000002" in info.rejected[0]
    state = small_state(7)
    toys.manager(tmp_path).load(state, info)
    toys.assert_same(state, small_state(1))


def test_every_flipped_bit_is_found(tmp_path):
    toys.save(tmp_path, small_state(1), 1)
    for name in ("rank-00000.safetensors", "manifest.json"):
        path = tmp_path / "step-00000001" / name
        good = path.read_bytes()
        for position in range(0, len(good), 7):
            flip_bit(path, position)
            with pytest.raises(UserError):
                toys.manager(tmp_path).latest()
            path.write_bytes(good)
    assert toys.manager(tmp_path).latest() is not None


def test_nothing_saved_is_none_but_nothing_sound_is_an_error(tmp_path):
    assert toys.manager(tmp_path / "absent").latest() is None
    toys.save(tmp_path, small_state(1), 1)
    truncate(data_file(tmp_path, 1))
    with pytest.raises(UserError, match="no checkpoint here can be loaded"):
        toys.manager(tmp_path).latest()


def test_a_temporary_directory_is_never_picked_and_goes_at_the_next_save(tmp_path):
    toys.save(tmp_path, small_state(1), 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009.tmp-abc")
    (tmp_path / "step-00000008").mkdir()
    assert toys.manager(tmp_path).latest().manifest.step == 1
    toys.save(tmp_path, small_state(2), 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000008"]


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
from disttrain.checkpoint import local
from tests.checkpoint.test_manager import small_state
from tests.checkpoint import toys

def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)

where, name = sys.argv[2].split(":")
setattr({"local": local, "Path": Path}[where], name, killed)
toys.save(Path(sys.argv[1]), small_state(2), 2)
"""


@pytest.mark.parametrize("moment", ["local:write_bytes", "Path:rename"])
def test_kill_before_the_rename_leaves_the_older_checkpoint(tmp_path, moment):
    toys.save(tmp_path, small_state(1), 1)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED_SAVE, tmp_path, moment], cwd=root, check=False, timeout=120)
    assert done.returncode == -9
    (temporary,) = tmp_path.glob("*.tmp-*")
    assert (temporary / "rank-00000.safetensors").is_file()
    assert (temporary / "manifest.json").is_file() == (moment == "Path:rename")
    info = toys.manager(tmp_path).latest()
    assert (info.manifest.step, info.rejected) == (1, ())
    toys.save(tmp_path, small_state(2), 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_failed_commit_leaves_no_trace(tmp_path):
    toys.save(tmp_path, small_state(1), 1)
    full_disk = OSError(errno.ENOSPC, "No space left on device", "manifest.json")
    with (
        patch.object(local, "write_bytes", side_effect=full_disk),
        pytest.raises(UserError, match="No space left on device"),
    ):
        toys.save(tmp_path, small_state(2), 2)
    assert names(tmp_path) == ["step-00000001"]


def test_retention_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        toys.save(tmp_path, small_state(step), step, keep_last=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    toys.save(tmp_path, small_state(5), 5, keep_last=1)
    assert names(tmp_path) == ["step-00000005"]
    with pytest.raises(UserError, match="keep_last"):
        toys.manager(tmp_path, 0)


def test_retention_never_prefers_a_later_damaged_checkpoint(tmp_path):
    for step in (1, 3):
        toys.save(tmp_path, small_state(step), step)
    truncate(data_file(tmp_path, 3))
    toys.save(tmp_path, small_state(2), 2, keep_last=1)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert toys.manager(tmp_path).latest().manifest.step == 2


def test_the_same_step_again(tmp_path):
    path = toys.save(tmp_path, small_state(1), 1)
    before = (path / "manifest.json").stat()
    assert toys.save(tmp_path, small_state(1), 1) == path
    assert (path / "manifest.json").stat() == before
    with pytest.raises(UserError, match="belongs to run run-a, not run-b"):
        toys.save(tmp_path, small_state(1), 1, run_id="run-b")
    truncate(data_file(tmp_path, 1))
    toys.save(tmp_path, small_state(1), 1)
    assert toys.manager(tmp_path).latest().manifest.step == 1
    assert names(tmp_path) == ["step-00000001"]


def test_a_renamed_checkpoint_is_refused(tmp_path):
    toys.save(tmp_path, small_state(1), 1).rename(tmp_path / "step-00000002")
    with pytest.raises(UserError, match="holds step 1"):
        toys.manager(tmp_path).latest()


def test_mismatches_are_all_listed_and_nothing_is_touched(tmp_path):
    toys.save(tmp_path, small_state(1) | {"model.old": torch.ones(1)}, 1)
    state = {"model.weight": torch.zeros(2, 3), "optim.weight.step": torch.zeros((), dtype=torch.float64)}
    state |= {"model.new": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        toys.manager(tmp_path).load(state, toys.manager(tmp_path).latest())
    assert [problem.removeprefix(f"{tmp_path}/step-00000001: ") for problem in caught.value.problems] == [
        "model.new: not in the checkpoint",
        "model.old: in the checkpoint, but not asked for",
        "model.weight: float32 (3, 2) in the checkpoint, float32 (2, 3) here",
        "optim.weight.step: float32 () in the checkpoint, float64 () here",
    ]
    assert all(not tensor.any() for tensor in state.values())


def test_only_tensors_of_known_dtypes_are_saved(tmp_path):
    with pytest.raises(UserError, match=r"model.step: not a tensor"):
        toys.save(tmp_path, small_state(1) | {"model.step": 3}, 1)
    with pytest.raises(UserError, match=r"torch.complex64 cannot be stored"):
        toys.save(tmp_path, small_state(1) | {"model.c": torch.ones(1, dtype=torch.complex64)}, 1)
    assert names(tmp_path) == []


def test_the_manifest_tells_where_the_run_was(tmp_path):
    path = toys.save(tmp_path, small_state(4), 4)
    manifest = read_manifest(path)
    assert (manifest.run_id, manifest.step, manifest.samples, manifest.tokens) == ("run-a", 4, 32, 256)
    assert manifest.config == {"model": {"width": 6, "eps": 1e-8}}
    assert manifest.versions.keys() == {"torch", "disttrain", "python"}
    assert manifest.tensors["model.weight"].chunks[0].key == "model.weight"


def test_training_state_wants_optimizer_state_as_tensors():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match=r"optim.bias: no optimizer state yet"):
        training_state(model, optimizer)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": 1}
    with pytest.raises(UserError, match=r"optim.weight.step: int, not a tensor"):
        training_state(model, optimizer)


def test_names_do_not_depend_on_compilation_or_frozen_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], momentum=0.9)
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    plain = training_state(model, optimizer)
    assert training_state(torch.compile(model), optimizer).keys() == plain.keys()
    assert {"model.0.bias", "model.1.running_mean", "optim.0.weight.momentum_buffer"} <= plain.keys()
    assert "optim.0.bias.momentum_buffer" not in plain
