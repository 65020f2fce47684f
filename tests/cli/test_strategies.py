"""The strategies as a user meets them: the configs that we ship, narrow types, and what does not go together."""

from __future__ import annotations

import platform
import sys
import tomllib
from pathlib import Path

import pytest

from tests.cli.helpers import ROOT, Ended, disttrain, environment, losses, refused, rows, status

CONFIGS = {"quickstart": "fsdp", "ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "fsdp": "fsdp", "hsdp": "hsdp"}
TINY = (
    "model.n_layers=2",
    "model.d_model=32",
    "data.source=synthetic",
    "data.tokenizer=bytes",
    "train.steps=3",
    "train.global_batch_tokens=512",
    "train.sequence_length=32",
    "schedule.warmup_steps=2",
    "monitor.log_every=1",
    "monitor.evaluate_tokens=512",
    "monitor.sample_tokens=0",
    "monitor.bigram_baseline=false",
)
BAD = {
    "a type that gradients do not come in": (
        ["parallel.param_dtype=bf16", "parallel.reduce_dtype=fp16"],
        ["reduce_dtype = fp16", "param_dtype = bf16", "fp32"],
    ),
    "hsdp without sizes": (["parallel.strategy=hsdp"], ["hsdp needs parallel.dp_shard", "parallel.dp_replicate"]),
    "a mesh that does not fit": (
        ["parallel.strategy=hsdp", "parallel.dp_replicate=3", "parallel.dp_shard=2"],
        ["dp_replicate 3 x dp_shard 2 = 6 processes", "there are 4", "--nproc 6"],
    ),
    "what zero1 decides itself": (
        ["parallel.strategy=zero1", "parallel.grad_accumulation=sharded"],
        ["grad_accumulation", "zero1 decides it itself"],
    ),
    "nothing to offload": (
        ["parallel.strategy=ddp", "parallel.cpu_offload=true"],
        ["cpu_offload", "ddp has none", "fsdp"],
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def reference(cache: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the first config that a new user runs."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    assert_completed(train("quickstart", folder, cache), folder)
    return losses(folder)


def train(config: str, folder: Path, *overrides: str, env: dict[str, str] | None = None) -> Ended:
    return disttrain("train", ROOT / f"configs/{config}.toml", f"run.dir={folder}", *TINY, *overrides, env=env)


def assert_completed(ended: Ended, folder: Path) -> None:
    assert (ended.code, ended.err) == (0, ""), ended
    assert status(folder) == {"state": "completed", "step": 3}


@pytest.mark.parametrize("name", [*CONFIGS, "gpt2_124m", "muon"])
def test_configs_resolve(name: str, no_torch: dict[str, str]) -> None:
    ended = disttrain("config", ROOT / f"configs/{name}.toml", env=no_torch)
    assert (ended.code, ended.err) == (0, "")
    table = tomllib.loads(ended.out)
    assert table["run"]["name"] == name
    assert table["parallel"]["strategy"] == {**CONFIGS, "muon": "fsdp"}.get(name, "zero2")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "quickstart"])
def test_every_config_trains_the_same_run(name: str, cache: str, reference: dict[int, float], tmp_path: Path) -> None:
    assert list(reference) == [1, 2, 3]
    folder = tmp_path / "run"
    assert_completed(train(name, folder, cache), folder)
    assert losses(folder) == pytest.approx(reference, rel=1e-6)


def test_fp16_logs_its_loss_scale(cache: str, reference: dict[int, float], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert_completed(train("zero2", folder, cache, "parallel.param_dtype=fp16"), folder)
    logged = [row for row in rows(folder) if "loss" in row]
    assert losses(folder) == pytest.approx(reference, rel=1e-2)
    skipped = 0.0
    for row in logged:
        skipped += row["skipped_steps"]
        assert row["loss_scale"] == 2.0 ** (16 - skipped)
    assert skipped < len(logged)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="oneDNN can hide the units of x86 CPUs only"
)
def test_bf16_without_units_says_so(cache: str, reference: dict[int, float], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    env = environment(ONEDNN_MAX_CPU_ISA="AVX2")
    ended = train("ddp", folder, cache, "parallel.param_dtype=bf16", env=env)
    assert_completed(ended, folder)
    [line] = [line for line in ended.out.splitlines() if "slower" in line]
    assert "bf16" in line
    assert losses(folder) == pytest.approx(reference, rel=1e-2)
    assert "loss_scale" not in rows(folder)[0]


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_go_together(case: str, config: Path, no_torch: dict[str, str], tmp_path: Path) -> None:
    overrides, words = BAD[case]
    ended = disttrain("train", config, "--nproc", 4, f"run.dir={tmp_path / 'run'}", *overrides, env=no_torch)
    [line] = refused(ended)
    for word in words:
        assert word in line
    assert not (tmp_path / "run/status.json").exists()


def test_compile_without_a_compiler(config: Path, no_torch: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    env = no_torch | {"PATH": str(tmp_path / "bin")}
    [line] = refused(disttrain("train", config, f"run.dir={tmp_path / 'run'}", "parallel.compile=true", env=env))
    for word in ("parallel.compile", "compiler", "PATH", "parallel.compile=false"):
        assert word in line
