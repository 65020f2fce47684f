"""A run that changes its engine twice, through the public command; and what it leaves in its folder."""

from __future__ import annotations

import json
import signal
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.cli.helpers import (
    TRAIN,
    Ended,
    checkpoints,
    disttrain,
    finish,
    losses,
    refused,
    started,
    status,
    wait_for,
    wait_for_a_step,
)

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        find_spec("deepspeed") is None or find_spec("accelerate") is None,
        reason="deepspeed and accelerate come with the extras [deepspeed,accelerate]",
    ),
]
SETTINGS = ("monitor.log_every=1", "checkpoint.every=4", "optim.clip_norm=0.5")
STAGE_3 = ("engine=deepspeed", "deepspeed.stage=3")
SHARDED = ("engine=accelerate", "parallel.strategy=fsdp")


def train(config: Path, folder: Path, *settings: str, nproc: int = 2) -> Ended:
    ended = disttrain("train", config, "--nproc", nproc, f"run.dir={folder}", *SETTINGS, *settings)
    assert ended.code == 0, ended
    return ended


@pytest.fixture(scope="module")
def folders(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Ended]]:
    """Twelve native steps; and four under each of DeepSpeed, Accelerate (on one process less) and our own engine."""
    folder = tmp_path_factory.mktemp("runs")
    train(config, folder / "native", "train.steps=12", "parallel.strategy=ddp")
    file = folder / "ds.json"
    table = {"gradient_clipping": 0.5, "zero_optimization": {"stage": "auto", "reduce_bucket_size": 10_000}}
    file.write_text(json.dumps(table))
    ended = [
        train(config, folder / "moved", "train.steps=4", *STAGE_3, f"deepspeed.config_file={file}"),
        train(config, folder / "moved", "train.steps=8", *SHARDED, nproc=1),
        train(config, folder / "moved", "train.steps=12", "parallel.strategy=zero1"),
    ]
    return folder / "native", folder / "moved", ended


def test_the_run_is_the_same(folders: tuple[Path, Path, list[Ended]]) -> None:
    native, moved, ended = folders
    assert list(losses(moved)) == list(range(1, 13))
    assert losses(moved) == pytest.approx(losses(native), rel=1e-5)
    assert status(moved) == {"state": "completed", "step": 12}
    assert checkpoints(moved)[-1] == "step-00000012"
    assert "note: changed since step 4: engine was 'deepspeed', is 'accelerate'" in ended[1].out
    assert all("Warning" not in one.err and "Traceback" not in one.err for one in ended)


def test_who_owns_and_updates_parameters_is_told(folders: tuple[Path, Path, list[Ended]]) -> None:
    _, _, ended = folders
    assert "AdamW in deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3)" in ended[0].out
    assert "elements over 2" in ended[0].out
    assert "the noise scale is not measured" in ended[0].out
    assert "AdamW in accelerate.optimizer.AcceleratedOptimizer)" in ended[1].out
    assert "rows over 1" in ended[1].out


def test_what_deepspeed_was_given(folders: tuple[Path, Path, list[Ended]]) -> None:
    _, moved, _ = folders
    given = json.loads((moved / "ds_config.json").read_text())
    assert (given["train_micro_batch_size_per_gpu"], given["gradient_accumulation_steps"]) == (2, 2)
    assert given["gradient_clipping"] == 0.0  # ours clips
    assert given["zero_optimization"]["stage"] == 3
    assert given["zero_optimization"]["reduce_bucket_size"] == 10_000
    assert "bf16" not in given


def test_tools_read_the_run(folders: tuple[Path, Path, list[Ended]]) -> None:
    _, moved, _ = folders
    assert disttrain("evaluate", moved).code == 0
    assert disttrain("generate", moved, "--prompt", "a", "--tokens", 4).code == 0
    assert disttrain("report", moved).code == 0


def test_a_run_that_is_stopped_and_loses_a_rank(config: Path, tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL of a rank: the losses are those of a run that nobody disturbed, to the bit."""
    train(config, tmp_path / "undisturbed", *STAGE_3, "train.steps=16")
    folder = tmp_path / "run"
    command = (*TRAIN, config, "--nproc", 2, f"run.dir={folder}", *SETTINGS, *STAGE_3)
    with started(*command, "train.steps=100000") as process:
        wait_for_a_step(folder, process)
        process.send_signal(signal.SIGTERM)
        assert finish(process).code == 75
    stopped = status(folder)
    assert stopped["state"] == "preempted"
    steps = max(16, stopped["step"] + 40)
    with started(*command, f"train.steps={steps}") as process:
        wait_for(lambda: max(checkpoints(folder)) > f"step-{stopped['step']:08d}", process)
        max(psutil.Process(process.pid).children(), key=lambda child: child.pid).kill()
        ended = finish(process)
    assert ended.code == 0, ended
    assert "was killed by SIGKILL" in ended.err
    assert ended.out.count("starting again from step") == 1
    assert status(folder) == {"state": "completed", "step": steps}
    expected = losses(tmp_path / "undisturbed")
    assert {step: loss for step, loss in losses(folder).items() if step <= 16} == expected


def test_a_value_that_deepspeed_refuses(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": -5}}))
    settings = (*STAGE_3, f"deepspeed.config_file={file}", f"run.dir={tmp_path / 'run'}")
    line, *_ = refused(disttrain("train", config, "--nproc", 2, *settings))
    for word in ("deepspeed.config_file", "reduce_bucket_size", "-5"):
        assert word in line
