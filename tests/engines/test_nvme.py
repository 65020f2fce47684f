"""Parameters that DeepSpeed keeps on a disk: the same run, from files that are the run's own and do not stay behind."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.config.deepspeed_nvme import swap_folder
from disttrain.config.load import load_config
from disttrain.engines.swapped import check_buffers
from disttrain.errors import UserError
from disttrain.testing import RankPool
from disttrain.train.swap_disk import check_swap_disk, libaio_problem, swap_space
from tests.cli.helpers import disttrain, environment, losses, refused, status
from tests.engines.test_parity import AVERAGED, case, compare

MODEL = {"d_model": 512, "d_ff": 1024, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8}
"""The MLP's matrices have 1 MiB in each of two processes in fp32; DeepSpeed leaves in memory what has less."""
IN_MEMORY = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
SETTINGS = ("engine=deepspeed", "deepspeed.stage=3", "deepspeed.offload_optimizer=cpu")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def libaio() -> None:
    """Compiled, which takes minutes the first time."""
    if problem := libaio_problem():
        pytest.skip(problem)
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed comes with the extra [deepspeed]")
    build = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)"
    subprocess.run(
        [sys.executable, "-c", build], env=environment(DS_ACCELERATOR="cpu"), check=True, capture_output=True
    )


@pytest.fixture
def on_disk(libaio: None, tmp_path: Path) -> dict[str, Any]:
    """The section [deepspeed]: six matrices go to the disk in three parts."""
    file, disk = tmp_path / "ds.json", tmp_path / "disk"
    file.write_text(json.dumps({"zero_optimization": {"sub_group_size": 500_000}, "aio": {"block_size": 1 << 18}}))
    disk.mkdir()
    return {
        "offload_optimizer": "cpu",
        "offload_parameters": "nvme",
        "nvme_path": str(disk),
        "config_file": str(file),
    }


def test_the_same_run_from_a_disk(engine_pool: RankPool, cache: Path, on_disk: dict[str, Any]) -> None:
    cases = {
        "native": case("native", "ddp", model=MODEL),
        "memory": case("deepspeed", "fsdp", model=MODEL, deepspeed=IN_MEMORY),
        "disk": case("deepspeed", "fsdp", model=MODEL, deepspeed=on_disk),
    }
    found = engine_pool.run("tests.engines.jobs:train", 2, timeout_seconds=240, cache=cache, cases=cases)
    assert compare(found, 1e-3) == {}
    assert all(rank["disk"][0] == rank["memory"][0] for rank in found)  # to the bit, the next line too
    assert all(torch.equal(tensor, found[0]["memory"][1][name]) for name, tensor in found[0]["disk"][1].items())
    files = list(Path(on_disk["nvme_path"]).rglob("*.swp"))
    assert len(files) == 2 * 6
    assert {file.stat().st_size for file in files} == {1 << 20}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_evaluation_between_steps(engine_pool: RankPool, cache: Path, on_disk: dict[str, Any], dtype: str) -> None:
    """Of averaged weights: what was read ahead for a backward that does not come is not used for another one."""
    width = {"d_ff": 1024 if dtype == "fp32" else 2048}
    cases = {
        name: case(
            "deepspeed",
            "fsdp",
            model=MODEL | width,
            deepspeed=section,
            optim=AVERAGED,
            parallel={"param_dtype": dtype},
        )
        for name, section in {"memory": IN_MEMORY, "disk": on_disk}.items()
    }
    job = "tests.engines.jobs:evaluate_between"
    for rank in engine_pool.run(job, 2, timeout_seconds=240, cache=cache, cases=cases):
        assert rank["disk"] == rank["memory"]
    assert list(Path(on_disk["nvme_path"]).rglob("*.swp"))


def test_a_run_stops_and_goes_on(config: Path, on_disk: dict[str, Any], tmp_path: Path) -> None:
    """By the command: checkpoints, evaluation, a resume; nothing is left on the disk, another run's files stay."""
    model = [f"model.{key}={value}" for key, value in MODEL.items()] + ["model.mlp=swiglu"]
    often = ("monitor.log_every=1", "checkpoint.every=2", "monitor.evaluate_every=2")
    for name, settings in {
        "memory": [*SETTINGS, "deepspeed.offload_parameters=cpu"],
        "disk": [*SETTINGS, *(f"deepspeed.{key}={value}" for key, value in on_disk.items())],
    }.items():
        others = Path(on_disk["nvme_path"]) / "other-run"
        others.mkdir(exist_ok=True)
        for steps in (4, 8):
            command = (config, "--nproc", 2, f"run.dir={tmp_path / f'run-{name}'}", f"train.steps={steps}")
            ended = disttrain("train", *command, *model, *often, *settings)
            assert ended.code == 0, ended
            assert list(Path(on_disk["nvme_path"]).iterdir()) == [others]
    assert losses(tmp_path / "run-disk") == losses(tmp_path / "run-memory")
    assert status(tmp_path / "run-disk") == {"state": "completed", "step": 8}
    given = json.loads((tmp_path / "run-disk/ds_config.json").read_text())
    assert Path(given["zero_optimization"]["offload_param"]["nvme_path"]).parent == others.parent
    assert given["aio"] == {"block_size": 1 << 18}


DISK = (*SETTINGS, "deepspeed.offload_parameters=nvme")
BAD = {
    "no disk": ([*DISK], ["offload_parameters = 'nvme'", "set deepspeed.nvme_path"]),
    "a disk for nothing": (
        [*SETTINGS, "deepspeed.nvme_path=/tmp"],
        ["nvme_path = '/tmp'", "nothing goes to a disk", "leave it out"],
    ),
    "weights on the device": (
        [*DISK, "deepspeed.nvme_path=/tmp", "deepspeed.offload_optimizer=none"],
        ["offload_parameters = 'nvme'", "set deepspeed.offload_optimizer = 'cpu'"],
    ),
    "no such folder": (
        [*DISK, "deepspeed.nvme_path=/nowhere/at/all"],
        ["deepspeed.nvme_path = /nowhere/at/all", "no such folder", "local disk"],
    ),
    "a folder that takes no files": (
        [*DISK, "deepspeed.nvme_path=/proc"],
        ["deepspeed.nvme_path = /proc", "cannot be written"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str, config: Path, libaio: None, no_torch: dict[str, str], tmp_path: Path) -> None:
    settings, words = BAD[case]
    [line] = refused(disttrain("train", config, "--nproc", 2, f"run.dir={tmp_path / 'run'}", *settings, env=no_torch))
    for word in words:
        assert word in line


def test_a_file_that_says_something_else(config: Path, on_disk: dict[str, Any], no_torch: dict[str, str]) -> None:
    table = {"stage3_max_reuse_distance": 10**9, "offload_param": {"device": "cpu", "nvme_path": "/elsewhere"}}
    Path(on_disk["config_file"]).write_text(json.dumps({"zero_optimization": table}))
    settings = [*SETTINGS, *(f"deepspeed.{key}={value}" for key, value in on_disk.items())]
    lines = refused(disttrain("train", config, "--nproc", 2, *settings, env=no_torch))
    expected = [
        ("stage3_max_reuse_distance is 1000000000 there", "is 0 here"),
        ("offload_param.device is 'cpu' there", "deepspeed.offload_parameters is 'nvme' here"),
        ("offload_param.nvme_path is '/elsewhere' there", f"deepspeed.nvme_path is '{on_disk['nvme_path']}' here"),
    ]
    assert len(lines) == len(expected), lines
    for line, words in zip(lines, expected, strict=True):
        assert all(word in line for word in words), line


def test_a_machine_without_libaio(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load_config(config, [*DISK, f"deepspeed.nvme_path={tmp_path}"]).config
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr("disttrain.train.swap_disk._built_before", lambda: False)
    monkeypatch.setattr("disttrain.train.swap_disk.subprocess.run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="install libaio-dev"):
        check_swap_disk(wanted)
    monkeypatch.setattr("disttrain.train.swap_disk.shutil.which", lambda _: None)
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        check_swap_disk(wanted)


def test_buffers_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = {"sub_group_size": 1000, "offload_param": {"buffer_count": 5, "buffer_size": 501}}
    check_buffers([1001, 10], 2, 4, zero)
    monkeypatch.setattr("disttrain.engines.swapped._can_lock", lambda size: size < 4 * (5 * 501 + 506))
    with pytest.raises(UserError, match=r"5 buffers of 501 elements, and 506 on their way.*ulimit -l"):
        check_buffers([1001, 10], 2, 4, zero)
    with pytest.raises(UserError, match="buffer_size = 501, and the largest parameter has 502"):
        check_buffers([1003], 2, 4, zero)


def test_what_a_killed_run_has_left(config: Path, tmp_path: Path) -> None:
    """The next start of the run takes it away, that of another run does not."""
    of = [load_config(config, [*DISK, f"deepspeed.nvme_path={tmp_path}", f"run.name={name}"]).config for name in "ab"]
    left = [folder / "zero_stage_3" for one in of if (folder := swap_folder(one))]
    for folder in left:
        folder.mkdir(parents=True)
    with swap_space(of[0]):
        assert [folder.exists() for folder in left] == [False, True]
