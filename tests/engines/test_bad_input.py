"""What an engine cannot do is refused at the start, without torch, with the reason and the nearest that it can."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from disttrain.config.accelerate import launcher_problems
from disttrain.config.load import load_config
from disttrain.config.monitor import MonitorConfig
from disttrain.errors import UserError
from disttrain.train.extras import check_extras
from tests.cli.helpers import disttrain, refused

ZERO_1 = ("engine=deepspeed", "deepspeed.stage=1")
BAD = {
    "an unknown engine": (["engine=horovod"], ["engine", "'native', 'deepspeed' or 'accelerate'", "horovod"]),
    "a stage that is not the strategy's": (
        ["engine=deepspeed", "deepspeed.stage=2", "parallel.strategy=fsdp"],
        ["deepspeed.stage = 2", "parallel.strategy = 'fsdp'", "stage 3", "leave one out"],
    ),
    "copies of shards": (
        ["engine=deepspeed", "parallel.strategy=hsdp", "parallel.dp_replicate=2"],
        ["'hsdp'", "the nearest is fsdp (stage 3)"],
    ),
    "muon on runs of elements": (
        [*ZERO_1, "optim.preset=muon"],
        ["group matrices", "muon needs whole rows or matrices", "ZeRO stage 1", "deepspeed.stage = 0"],
    ),
    "rows to clip by": ([*ZERO_1, "optim.clip.kind=agc"], ["agc works on rows", "ZeRO stage 1", "clip by norm"]),
    "state in few bits": ([*ZERO_1, "optim.state_dtype=int8"], ["state_dtype = 'int8'", "leave it out"]),
    "heads to clip": ([*ZERO_1, "optim.qk_clip.mode=clip"], ["optim.qk_clip", "rows of heads", "engine = 'native'"]),
    "a disk for our state": (
        ["engine=deepspeed", "deepspeed.stage=3", "deepspeed.offload_optimizer=nvme"],
        ["offload_optimizer = 'nvme'", "one part of the parameters in memory at a time", "the nearest is 'cpu'"],
    ),
    "nothing to offload": (
        ["engine=deepspeed", "deepspeed.stage=0", "deepspeed.offload_optimizer=cpu"],
        ["deepspeed.offload_optimizer", "stage 0 cuts nothing", "stage 1"],
    ),
    "parameters that stay whole": (
        ["engine=deepspeed", "deepspeed.stage=2", "deepspeed.offload_parameters=cpu"],
        ["deepspeed.offload_parameters", "stage 2 leaves parameters whole", "stage 3"],
    ),
    "our own offloading": (
        ["engine=deepspeed", "parallel.cpu_offload=true"],
        ["parallel.cpu_offload", "deepspeed.offload_optimizer = 'cpu'"],
    ),
    "gradients kept whole": (
        ["engine=deepspeed", "parallel.grad_accumulation=unsharded"],
        ["grad_accumulation = 'unsharded'", "after every microbatch", "zero1"],
    ),
    "settings of another engine": (
        ["deepspeed.stage=1"],
        ["deepspeed.stage", "the engine is 'native'", "set engine = 'deepspeed'"],
    ),
    "what accelerate has not": (
        ["engine=accelerate", "parallel.strategy=zero1"],
        ["'zero1'", "DDP and FSDP2", "engine = 'native'"],
    ),
    "a file that is not there": ([*ZERO_1, "deepspeed.config_file=none.json"], ["none.json", "No such file"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_an_engine_cannot_do(case: str, config: Path, no_torch: dict[str, str], tmp_path: Path) -> None:
    overrides, words = BAD[case]
    ended = disttrain("train", config, "--nproc", 4, f"run.dir={tmp_path / 'run'}", *overrides, env=no_torch)
    [line] = refused(ended)
    for word in words:
        assert word in line
    assert not (tmp_path / "run/status.json").exists()


def test_a_batch_that_follows_the_noise(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "auto.toml"
    file.write_text(config.read_text().replace("steps = 40\nglobal", "tokens = 10_240\nglobal"))
    with pytest.raises(UserError) as refusal:
        load_config(file, [*ZERO_1, "train.batch_auto.start_tokens=128"])
    [line] = refusal.value.problems
    for word in ("train.batch_auto", "not measured", "train.batch_ramp"):
        assert word in line


@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_a_missing_package(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disttrain.train.extras.find_spec", lambda package: None)
    with pytest.raises(UserError) as refusal:
        check_extras(MonitorConfig(), engine)
    [line] = refusal.value.problems
    assert f"engine = '{engine}'" in line
    assert f"pip install 'disttrain[{engine}]'" in line


def test_a_file_that_says_something_else(config: Path, no_torch: dict[str, str], tmp_path: Path) -> None:
    """All differences at once, each with both sides; what only tunes, or agrees, or is `auto`, is no difference."""
    file = tmp_path / "ds.json"
    table = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.3,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 128, "initial_scale_power": 12},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "round_robin_gradients": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupLR"},
        "wandb": {"enabled": True},
    }
    file.write_text(json.dumps(table))
    settings = (*ZERO_1, f"deepspeed.config_file={file}", f"run.dir={tmp_path / 'run'}")
    lines = refused(disttrain("train", config, "--nproc", 2, *settings, env=no_torch))
    expected = [
        ("train_batch_size is 64 there", "train.global_batch_tokens / train.sequence_length is 8 here"),
        ("gradient_clipping is 0.3 there", "optim.clip_norm is 1.0 here"),
        ("fp16.loss_scale is 128 there", "which follows the gradients, is 0 here"),
        ("zero_optimization.stage is 2 there", "is 1 here"),
        ("zero_optimization.round_robin_gradients", "take it out"),
        ("optimizer.params.lr is 0.0001 there", "optim.lr is 0.0003 here"),
        ("scheduler.type", "the rate follows [schedule]"),
        ("wandb.enabled", "[monitor]"),
        ("bf16.enabled is true there", "parallel.param_dtype is 'fp32' here"),
    ]
    assert len(lines) == len(expected), lines
    for line, words in zip(lines, expected, strict=True):
        assert str(file) in line
        for word in words:
            assert word in line


def test_what_accelerate_launch_says(config: Path) -> None:
    sharded = load_config(config, ["engine=accelerate", "parallel.strategy=fsdp"], world=2).config
    said = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "1",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }
    lines = list(launcher_problems(sharded, said, world=2))
    expected = [
        ("dynamo_backend", "parallel.compile"),
        ("ACCELERATE_MIXED_PRECISION = bf16", "parallel.param_dtype is fp32 here"),
        ("FSDP_VERSION = 1", "is 2 here"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS = 8", "the number of microbatches of a process is 2 here"),
    ]
    assert len(lines) == len(expected), lines
    for line, words in zip(lines, expected, strict=True):
        for word in words:
            assert word in line
    replicated = load_config(config, ["engine=accelerate", "parallel.strategy=ddp"], world=2).config
    fine = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}
    assert list(launcher_problems(replicated, fine, world=2)) == []
    [line] = launcher_problems(replicated, {"ACCELERATE_USE_DEEPSPEED": "true"}, world=2)
    assert "engine = 'deepspeed'" in line


def test_what_accelerate_launch_says_of_deepspeed(config: Path, tmp_path: Path) -> None:
    """Through Accelerate, DeepSpeed: its launcher starts the processes, and must not mean another run."""
    file = tmp_path / "Ours.json"
    file.write_text("{}")
    ours = load_config(config, [*ZERO_1, f"deepspeed.config_file={file}"], world=2).config
    said = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
    }
    assert list(launcher_problems(ours, said, world=2)) == []
    other = said | {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme",
        "ACCELERATE_GRADIENT_CLIPPING": "3.0",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "theirs.json",
    }
    lines = list(launcher_problems(ours, other, world=2))
    assert len(lines) == 5, lines
    text = "\n".join(lines)
    for words in ("STAGE = 2 from accelerate", "CLIPPING = 3.0", "optim.clip_norm is 1.0 here", "theirs.json"):
        assert words in text
    native = load_config(config, [], world=2).config
    assert list(launcher_problems(native, other, world=2)) == []


@pytest.mark.parametrize("supported", [True, False])
def test_fp16_where_deepspeed_does_not_compute_in_it(supported: bool) -> None:
    from disttrain.engines.deepspeed_start import check_fp16

    accelerator = SimpleNamespace(is_fp16_supported=lambda: supported, device_name=lambda: "cpu")
    check_fp16(accelerator, {"bf16": {"enabled": True}})
    context = nullcontext() if supported else pytest.raises(UserError, match=r"fp16.*on this cpu, .*use bf16")
    with context:
        check_fp16(accelerator, {"fp16": {"enabled": True}})
