"""Bad input: exit code 2, one line per problem with its words and numbers, before torch is imported."""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cli.helpers import Ended, disttrain, refused, run

CASES = {
    "unknown key": (["train.stepz=3"], ["train.stepz", "nearest valid key: train.steps"]),
    "a key by its other name": (["train.batch_size=3"], ["train.batch_size", "train.global_batch_tokens"]),
    "unknown section": (["trian.steps=3"], ["trian", "nearest valid key: train"]),
    "wrong type": (["train.steps=many"], ["train.steps", "'many'", "integer"]),
    "no number": (["optim.lr=nan"], ["optim.lr", "finite", "nan"]),
    "negative": (["train.steps=-1"], ["train.steps", "greater than 0", "-1"]),
    "no such choice": (["parallel.strategy=zero9"], ["parallel.strategy", "'fsdp' or 'hsdp'", "'zero9'"]),
    "heads": (["model.n_heads=3"], ["d_model = 16", "n_heads = 3", "nearest: d_model = 15"]),
    "two lengths": (["train.tokens=512"], ["train", "steps and tokens"]),
    "mesh": (["--nproc", "4", "parallel.dp_shard=3"], ["dp_shard 3", "= 3 processes", "there are 4", "--nproc 3"]),
    "batch": (["--nproc", "3"], ["= 256", "sequence_length 32 x 3 processes = 96", "nearest: 192 or 288"]),
    "half a sample": (["train.global_batch_tokens=250"], ["= 250", "sequence_length = 32", "nearest: 224 or 256"]),
    "a ramp that goes down": (
        ["train.batch_ramp.start_tokens=512", "train.batch_ramp.over_tokens=4096"],
        ["train", "16 samples is not below the last of 8"],
    ),
    "a ramp that goes backwards": (
        ["train.batch_ramp.start_tokens=64", "train.batch_ramp.double_at_tokens=[900, 800]"],
        ["double_at_tokens = [900, 800] goes backwards"],
    ),
    "a ramp of two kinds": (["train.batch_ramp.start_tokens=64"], ["one of over_tokens", "double_at_tokens"]),
    "a ramp that the ranks cannot share": (
        ["--nproc", "2", "train.batch_ramp.start_tokens=32", "train.batch_ramp.over_tokens=4096"],
        ["train.batch_ramp: the batch from token 0 on = 32", "32 x 2 processes = 64", "nearest: 64"],
    ),
    "auto without tokens": (["train.batch_auto.start_tokens=64"], ["batch_auto: set tokens in place of steps"]),
    "a long warm-up": (["schedule.warmup_steps=41"], ["group no_decay warms up", "10,496 tokens", "ends at 10,240"]),
    "no warm-up to fall from": (
        ["schedule.shape=inverse_sqrt", "schedule.warmup_steps=0"],
        ["'inverse_sqrt': group no_decay has no warm-up", "set schedule.warmup_steps"],
    ),
    "decay without a base": (
        ["schedule.keep_decay_timescale=true"],
        ["keep_decay_timescale needs schedule.base_batch_tokens"],
    ),
    "scale_lr in steps": (
        ["train.on_world_change=scale_lr", "schedule.base_batch_tokens=256"],
        ["train.on_world_change = 'scale_lr': set train.tokens in place of steps"],
    ),
    "a key of a ramp": (["train.batch_ramp.start_token=64"], ["nearest valid key: train.batch_ramp.start_tokens"]),
    "two units": (["schedule.warmup_tokens=5"], ["one of warmup_steps and warmup_tokens"]),
    "a rule without a base": (["schedule.batch_lr_rule=sqrt"], ["batch_lr_rule = 'sqrt' needs base_batch_tokens"]),
    "scale_lr without a base": (
        ["train.on_world_change=scale_lr"],
        ["train.on_world_change = 'scale_lr' needs schedule.base_batch_tokens"],
    ),
    "no process": (["--nproc", "0"], ["--nproc", "train.nproc", "greater than 0", "got 0"]),
    "no override": (["steps"], ["'steps'", "key.path=value"]),
    "through a value": (["device.name=cpu"], ["device is a value", "device.name"]),
    "no data": (["data.path={tmp}/nowhere"], ["{tmp}/nowhere", "no such file"]),
    "empty data": (["data.path={tmp}/empty.txt"], ["{tmp}/empty.txt", "empty"]),
    "no kind of data": (["data.path={tmp}/table.csv"], ["{tmp}/table.csv", ".txt"]),
    "short data": (
        ["data.path={tmp}/short.txt", "train.sequence_length=256", "train.global_batch_tokens=512"],
        ["training set", "sequence_length 256 + 1 = 257", "shorten the sequence"],
    ),
    "no text": (["data.path={tmp}/bad.jsonl"], ["{tmp}/bad.jsonl", "byte 16", '"text"']),
    "no vocabulary": (["data.path={tmp}/tokens.bin"], ["{tmp}/tokens.bin", "set model.vocab_size", "data.tokenizer"]),
    "vocabulary": (
        ["data.path={tmp}/tokens.bin", "model.vocab_size=100"],
        ["token 299", "100 - 1 = 99", "set model.vocab_size to 300"],
    ),
    "no tokenizer": (["data.tokenizer={tmp}/t.json"], ["tokenizer {tmp}/t.json", "tokenizer.json"]),
    "small tokenizer": (["model.vocab_size=200"], ["model.vocab_size = 200", "257 entries"]),
    "nothing to resume": (["run.resume=must"], ['run.resume = "must"', "no checkpoint"]),
    "no folder": (["run.dir={tmp}/empty.txt"], ["{tmp}/empty.txt", "set run.dir"]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").touch()
    (folder / "table.csv").write_text("1,2\n")
    (folder / "short.txt").write_text("a few words\n" * 10)
    (folder / "bad.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n' * 400)
    (np.arange(4000) % 300).astype("<u2").tofile(folder / "tokens.bin")
    (folder / "broken.toml").write_text("[train\nsteps = 3\n")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_settings_and_data(case: str, config: Path, files: Path, no_torch: dict[str, str], tmp_path: Path) -> None:
    arguments, words = CASES[case]
    filled = [argument.format(tmp=files) for argument in arguments]
    lines = refused(disttrain("train", config, f"run.dir={tmp_path / 'run'}", *filled, env=no_torch))
    assert len(lines) <= 2
    for word in words:
        assert word.format(tmp=files) in "\n".join(lines)


def test_two_problems_are_two_lines(config: Path, no_torch: dict[str, str]) -> None:
    lines = refused(disttrain("train", config, "train.stepz=3", "optim.lr=-1", "--nproc", 2, env=no_torch))
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
    assert "train.stepz" in lines[0] + lines[1]
    assert "optim.lr" in lines[0] + lines[1]


def test_config_files(files: Path, config: Path, no_torch: dict[str, str]) -> None:
    [line] = refused(disttrain("train", files / "broken.toml", env=no_torch))
    assert f"{files / 'broken.toml'}: not valid TOML" in line
    assert "line 1" in line
    [line] = refused(disttrain("train", config.parent / "tyni.toml", env=no_torch))
    assert "tyni.toml: no such file" in line
    assert str(config) in line
    [line] = refused(disttrain("train", files, env=no_torch))
    assert "a folder without config.json" in line


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_no_run_folder(command: str, files: Path, no_torch: dict[str, str]) -> None:
    [line] = refused(disttrain(command, files / "nowhere", env=no_torch))
    assert str(files / "nowhere") in line


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "x.toml", "--nprocs", "2"]])
def test_unknown_commands_and_options(arguments: list[str], no_torch: dict[str, str]) -> None:
    refused(disttrain(*arguments, env=no_torch))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.d_model=32", ["model.d_model was 16, is 32"]),
        ("train.seed=1", ["train.seed was 0, is 1", "fingerprint"]),
        ("data.tokenizer=bpe", ["tokenizer_sha256 was", "vocab_size was 257, is 1024"]),
    ],
)
@pytest.mark.parametrize("steps", [40, 50])
def test_another_run_in_the_same_folder(
    steps: int, override: str, words: list[str], config: Path, finished_folder: Path, no_torch: dict[str, str]
) -> None:
    arguments = [f"run.dir={finished_folder}", f"train.steps={steps}", override]
    lines = refused(disttrain("train", config, *arguments, env=no_torch))
    for word in words:
        assert word in "\n".join(lines)
    assert "holds step 40 of another run" in lines[-1]
    assert "run.name" in lines[-1]


def test_never_resume(config: Path, finished_folder: Path, no_torch: dict[str, str]) -> None:
    [line] = refused(disttrain("train", config, f"run.dir={finished_folder}", "run.resume=never", env=no_torch))
    assert "holds step-00000040" in line


def test_a_second_process_on_the_same_folder(config: Path, no_torch: dict[str, str], tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 4711 on a machine")
        lock.flush()
        [line] = refused(disttrain("train", config, f"run.dir={tmp_path}", env=no_torch))
    assert f"{tmp_path}: process 4711 on a machine is running here" in line
    assert not (tmp_path / "status.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_of_a_launcher(rank: int, config: Path, no_torch: dict[str, str], tmp_path: Path) -> None:
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = (sys.executable, "-m", "disttrain", "train", config, f"run.dir={tmp_path / 'run'}")
    ended: Ended = run(*command, env=no_torch | variables)
    [line] = refused(ended)
    assert "3 processes = 96" in line
    assert line.startswith(f"error: {'rank 1: ' if rank else ''}")
    assert not (tmp_path / "run").exists()
