"""disttrain checkpoint ls | verify | export, as a user runs them; the first two without torch."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disttrain.testing import RankPool
from tests.checkpoint import toys
from tests.cli.helpers import damage, disttrain, environment, refused, run


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3, 2), float(step)), "model.bias": torch.full((2,), float(step))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with steps 1 to 3, a save that was cut short, and a directory that lost its manifest."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        toys.save(checkpoints, {**weights(step), "optim.weight.step": torch.tensor(float(step))}, step)
    shutil.copytree(checkpoints / "step-00000003", checkpoints / "step-00000004.tmp-ab12cd34")
    (checkpoints / "step-00000000").mkdir()
    return tmp_path / "run"


def step_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def test_ls_shows_every_directory(folder: Path, no_torch: dict[str, str]) -> None:
    (step_folder(folder, 2) / "rank-00000.safetensors").unlink()
    manifest = step_folder(folder, 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens":64', '"tokens":65'))
    ended = disttrain("checkpoint", "ls", folder, env=no_torch)
    assert ended.code == 0, ended
    header, unfinished, three, two, one, bare = ended.out.splitlines()
    assert header.split() == ["checkpoint", "tokens", "MB", "files", "ranks", "state"]
    assert unfinished.startswith("step-00000004.tmp-ab12cd34 ")
    assert unfinished.endswith("unfinished save (ignored; the next save removes it)")
    assert three.split() == ["step-00000003", "192", "0.0", "1", "test", "x", "1", "whole"]
    assert two.startswith("step-00000002")
    assert "rank-00000.safetensors: " in two
    assert "manifest was changed" in one
    assert bare.endswith("no manifest (ignored)")


def test_ls_as_json(folder: Path, no_torch: dict[str, str]) -> None:
    with (step_folder(folder, 2) / "rank-00000.safetensors").open("ab") as file:
        file.write(b"more")
    ended = disttrain("checkpoint", "ls", folder / "checkpoints", "--json", env=no_torch)
    assert ended.code == 0, ended
    unfinished, three, two, _one, bare = json.loads(ended.out)["rows"]
    size = (step_folder(folder, 3) / "rank-00000.safetensors").stat().st_size
    expected = {"step": 3, "tokens": 192, "bytes": size, "files": 1, "strategy": "test", "world_size": 1}
    expected |= {"run_id": "run-a", "directory": str(step_folder(folder, 3)), "state": "whole", "problems": []}
    assert three == expected
    assert [row["step"] for row in (unfinished, two, bare)] == [4, 2, 0]
    assert "(+4)" in two["state"]
    assert len(two["problems"]) == 1
    assert unfinished["tokens"] is None


def test_verify_reads_every_byte(folder: Path, no_torch: dict[str, str]) -> None:
    ended = disttrain("checkpoint", "verify", folder, env=no_torch)
    assert ended.code == 0, ended
    size = (step_folder(folder, 3) / "rank-00000.safetensors").stat().st_size
    assert ended.out.splitlines() == [f"step-0000000{step}: ok, 1 file, {size:,} bytes" for step in (3, 2, 1)]
    damage(step_folder(folder, 3))
    assert "whole" in disttrain("checkpoint", "ls", step_folder(folder, 3), env=no_torch).out  # sizes are right
    ended = disttrain("checkpoint", "verify", folder, env=no_torch)
    assert ended.code == 1, ended
    three, two, _one, summary = ended.out.splitlines()
    assert three.startswith("step-00000003: damaged: rank-00000.safetensors: ")
    assert two.startswith("step-00000002: ok")
    assert summary == "1 of 3 damaged; newest sound checkpoint: step-00000002"
    assert disttrain("checkpoint", "verify", step_folder(folder, 2), env=no_torch).code == 0


def test_verify_as_json(folder: Path, no_torch: dict[str, str]) -> None:
    damage(step_folder(folder, 3))
    (step_folder(folder, 2) / "manifest.json").write_text("{")
    ended = disttrain("checkpoint", "verify", folder, "--json", env=no_torch)
    assert ended.code == 1, ended
    rows = json.loads(ended.out)["rows"]
    assert [(row["step"], row["ok"], len(row["problems"])) for row in rows] == [
        (3, False, 1),
        (2, False, 1),
        (1, True, 0),
    ]


def test_export_of_ranks(pool: RankPool, tmp_path: Path) -> None:
    job = {"strategy": "fsdp", "directory": tmp_path / "checkpoints", "step": 3}
    expected = pool.run("tests.checkpoint.jobs:save_step", world=4, **job)[0]
    out = tmp_path / "model.safetensors"
    ended = disttrain("checkpoint", "export", tmp_path, out)
    assert ended.code == 0, ended
    whole = {k.removeprefix("model."): v for k, v in expected.items() if k.startswith("model.")}
    toys.assert_same(load_file(out), whole)
    numbers = sum(tensor.numel() for tensor in whole.values())
    wrote, how = ended.out.splitlines()
    size = out.stat().st_size
    assert wrote == f"{out}: step 3 of run-a, {len(whole)} tensors, {numbers} parameters, {size:,} bytes"
    assert how == f'load it with safetensors.torch.load_file("{out}")'


def test_export_passes_over_what_is_damaged(folder: Path, tmp_path: Path) -> None:
    damage(step_folder(folder, 3))
    out = tmp_path / "model.safetensors"
    ended = disttrain("checkpoint", "export", folder, out, "--dtype", "float64")
    assert ended.code == 0, ended
    note, wrote, _how = ended.out.splitlines()
    assert note.startswith(f"note: passed over: {step_folder(folder, 3)}")
    assert "step 2 of run-a" in wrote
    toys.assert_same(load_file(out), {k.removeprefix("model."): v.double() for k, v in weights(2).items()})


def test_export_of_a_damaged_step_is_refused(folder: Path, tmp_path: Path) -> None:
    damage(step_folder(folder, 3))
    for target in ([folder, "--step", 3], [step_folder(folder, 3)]):
        lines = refused(disttrain("checkpoint", "export", target[0], tmp_path / "o.safetensors", *target[1:]))
        assert f"{step_folder(folder, 3)}" in lines[0]
        assert "nothing was written; see disttrain checkpoint verify" in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_replaces_a_file_only_when_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.write_text("old")
    [line] = refused(disttrain("checkpoint", "export", folder, out))
    assert f"{out}: exists (3 bytes); use another name, or --force" in line
    assert out.read_text() == "old"
    assert disttrain("checkpoint", "export", folder, out, "--force", "--step", 1).code == 0
    toys.assert_same(load_file(out), {k.removeprefix("model."): v for k, v in weights(1).items()})


def test_export_on_a_disk_that_refuses(folder: Path, tmp_path: Path) -> None:
    command = f"ulimit -f 0; exec {sys.executable} -m disttrain checkpoint export {folder} {tmp_path}/o.safetensors"
    ended = run("bash", "-c", command, env=environment())
    assert ended.code == 1, ended
    [line] = ended.err.splitlines()
    assert "bytes written" in line
    assert "bytes free" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


REFUSED = {
    "nowhere": (["ls", "{tmp}/nowhere"], "{tmp}/nowhere: No such file or directory; name a run folder"),
    "a file": (["verify", "{run}/checkpoints/step-00000001/manifest.json"], "manifest.json: Not a directory"),
    "no checkpoints": (["ls", "{tmp}"], "{tmp}: no checkpoint here; name a run folder"),
    "not committed": (["verify", "{run}/checkpoints/step-00000000"], "no manifest"),
    "unfinished": (["verify", "{run}/checkpoints/step-00000004.tmp-ab12cd34"], "unfinished save"),
    "no such step": (["export", "{run}", "o.safetensors", "--step", "7"], "there are step-00000003, step-00000002"),
    "a step of another": (
        ["export", "{run}/checkpoints/step-00000001", "o.safetensors", "--step", "2"],
        "there is step-00000001",
    ),
    "no such dtype": (["export", "{run}", "o.safetensors", "--dtype", "int8"], "--dtype int8: must be one of float64"),
    "another format": (["export", "{run}", "model.pt"], "model.pt: the file will be safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str, folder: Path, tmp_path: Path, no_torch: dict[str, str]) -> None:
    arguments, words = REFUSED[case]
    names = {"tmp": tmp_path, "run": folder}
    ended = disttrain("checkpoint", *(argument.format(**names) for argument in arguments), env=no_torch)
    assert words.format(**names) in "\n".join(refused(ended))
