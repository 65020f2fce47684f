"""One finished run on two processes: what it leaves, what it shows, and what the other commands make of it."""

from __future__ import annotations

import json
import math
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from disttrain.cli.app import app
from disttrain.data.tokenizer import Tokenizer
from disttrain.errors import UserError
from tests.cli.helpers import Ended, checkpoints, disttrain, losses, refused, rows, status

PLAIN_LINE = re.compile(r"step \d+/40  loss \d\.\d{4}  lr \d\.\d\de-\d\d  norm \d+\.\d\d  [\d,]+ tok/s  \d+ s left")


def inside(*arguments: object) -> Result:
    """A command in this very process, which has imported torch already."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_run_folder(finished_folder: Path) -> None:
    assert status(finished_folder) == {"state": "completed", "step": 40}
    assert checkpoints(finished_folder) == ["step-00000020", "step-00000040"]
    saved = json.loads((finished_folder / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 257
    assert saved["train"]["nproc"] == 2
    assert (finished_folder / "samples.txt").read_text().startswith("--- step 40\n")
    assert Tokenizer.load(finished_folder / "tokenizer.json").vocab_size == 257


def test_metrics(finished_folder: Path) -> None:
    logged = [row for row in rows(finished_folder) if "loss" in row]
    assert [row["step"] for row in logged] == list(range(1, 41))
    for row in logged:
        assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds"} <= set(row)
        assert row["tokens"] == 256 * row["step"]
        assert row["tokens_per_second"] > 0
    validated = [row for row in rows(finished_folder) if "validation_loss" in row]
    assert [row["step"] for row in validated] == [20, 40]
    assert all(row["validation_bits_per_byte"] > 0 for row in validated)


def test_loss_starts_at_chance_and_falls(finished_folder: Path) -> None:
    measured = losses(finished_folder)
    assert measured[1] == pytest.approx(math.log(257), rel=0.05)
    assert measured[40] < measured[1]


def test_plain_lines(finished: tuple[Path, Ended]) -> None:
    folder, ended = finished
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert len([line for line in lines if PLAIN_LINE.fullmatch(line)]) == 40
    assert len([line for line in lines if re.match(r"validation at step \d+: loss .*, bits per byte", line)]) == 2
    assert f"done: step 40, {folder}" in ended.out
    assert "\x1b" not in ended.out


def test_a_second_call_does_nothing(config: Path, finished_folder: Path, no_torch: dict[str, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_folder.rglob("*") if path.name != ".lock"}
    for start in (["train", config, f"run.dir={finished_folder}"], ["train", finished_folder]):
        ended = disttrain(*start, env=no_torch)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out == f"{finished_folder}: complete at step 40; nothing to do\n"
    ranked = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    ranked |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert disttrain("train", finished_folder, env=no_torch | ranked) == Ended(0, "", "")
    assert {path: path.stat().st_mtime_ns for path in finished_folder.rglob("*") if path.name != ".lock"} == before


def test_evaluate(finished_folder: Path, tmp_path: Path) -> None:
    ended = disttrain("evaluate", finished_folder, "--json")
    assert (ended.code, ended.err) == (0, "")
    shown = json.loads(ended.out)
    logged = [row for row in rows(finished_folder) if "validation_loss" in row][-1]
    assert shown["step"] == 40
    assert shown["tokens"] == 512
    for name in ("validation_loss", "validation_bits_per_byte"):
        assert shown[name] == pytest.approx(logged[name], rel=1e-6)
    words = inside("evaluate", finished_folder, "--tokens", 1024).stdout
    assert re.fullmatch(r"step 40: loss \d\.\d{4}, bits per byte \d\.\d{4}, over 1,024 tokens\n", words)


def test_evaluate_reads_the_newest_sound_checkpoint(finished_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_folder, folder)
    (folder / "checkpoints/step-00000040/manifest.json").write_text("{}")
    shown = json.loads(inside("evaluate", folder, "--json").stdout)
    assert shown["step"] == 20
    by_step = {row["step"]: row["validation_loss"] for row in rows(folder) if "validation_loss" in row}
    assert shown["validation_loss"] == pytest.approx(by_step[20], rel=1e-6)
    shutil.rmtree(folder / "checkpoints")
    assert "no checkpoint that verifies" in str(inside("evaluate", folder).exception)


def generated(folder: Path, **options: Any) -> str:
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = inside("generate", folder, "--tokens", 30, *arguments)
    assert result.exit_code == 0, result
    return result.stdout


def test_generate(finished_folder: Path) -> None:
    ended = disttrain("generate", finished_folder, "--prompt", "the word", "--tokens", 30, "--seed", 3)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("the word")
    assert generated(finished_folder, prompt="the word", seed=3) == ended.out
    assert generated(finished_folder, prompt="the word", seed=4) != ended.out


def test_generate_with_the_likeliest_tokens(finished_folder: Path) -> None:
    greedy = generated(finished_folder, prompt="a", temperature=0)
    assert generated(finished_folder, prompt="a", temperature=0, seed=5) == greedy
    assert generated(finished_folder, prompt="a", top_k=1) == greedy
    assert generated(finished_folder, prompt="a", top_p=1e-6) == greedy
    assert generated(finished_folder, prompt="a", top_k=257) == generated(finished_folder, prompt="a")


@pytest.mark.parametrize("option", [["--temperature", "-1"], ["--top-k", "0"], ["--top-p", "1.5"], ["--tokens", "0"]])
def test_generate_refuses(option: list[str], finished_folder: Path) -> None:
    result = inside("generate", finished_folder, *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr


def test_device_that_is_none(finished_folder: Path) -> None:
    for command in ("generate", "evaluate"):
        result = inside(command, finished_folder, "--device", "tpu")
        assert isinstance(result.exception, UserError), result
        assert "tpu" in str(result.exception)


def test_config_shows_values_and_origins(config: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.toml"
    child.write_text(f'extends = "{config}"\n\n[optim]\nlr = 1e-2\n')
    ended = inside("config", child, "train.steps=7")
    assert ended.exit_code == 0
    table, lines = tomllib.loads(ended.stdout), config.read_text().splitlines()
    assert (table["train"]["steps"], table["optim"]["lr"], table["model"]["d_model"]) == (7, 1e-2, 16)
    # The first of a name wins: other sections have a name and steps too.
    origins = dict(reversed(re.findall(r"^(?:# )?(\w+) .*? # (.+)$", ended.stdout, flags=re.MULTILINE)))
    assert origins["steps"] == "override 'train.steps=7'"
    assert origins["lr"] == f"{child}:4"
    assert origins["d_model"] == f"{config}:{lines.index('d_model = 16') + 1}"
    assert origins["weight_decay"] == "default"
    assert origins["name"] == "the config file's name"
    values = json.loads(inside("config", child, "train.steps=7", "--json").stdout)
    assert values["run"]["name"] == "child"
    assert {key: values["train"][key] for key in table["train"]} == table["train"]


def test_own_text(config: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in "ab":
        (data / f"{name}.txt").write_text("".join(f"{name} line {i} of a text\n" for i in range(1000)))
    lines = [json.dumps({"text": f"document {i}, not long\nat all"}) for i in range(1000)]
    (data / "c.jsonl").write_text("\n".join(lines))
    overrides = [f"data.path={data}", "data.tokenizer=bpe", "data.vocab_size=280", "train.steps=2"]
    ended = disttrain("train", config, f"run.dir={tmp_path / 'run'}", *overrides)
    assert ended.code == 0, ended
    assert losses(tmp_path / "run")[1] == pytest.approx(math.log(280), rel=0.05)
    assert (tmp_path / "run/samples.txt").exists()


def test_own_tokens(config: Path, no_torch: dict[str, str], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.bin"
    (np.arange(5000) % 97).astype("<u2").tofile(tokens)
    overrides = [f"data.path={tokens}", f"run.dir={tmp_path / 'run'}", "train.steps=2"]
    [line] = refused(disttrain("train", config, *overrides, env=no_torch))
    assert "set model.vocab_size" in line
    ended = disttrain("train", config, *overrides, "model.vocab_size=97")
    assert ended.code == 0, ended
    assert "note: " in ended.out
    assert "bits per byte n/a" in ended.out
    assert losses(tmp_path / "run")[1] == pytest.approx(math.log(97), rel=0.05)
    assert not (tmp_path / "run/samples.txt").exists()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        raise inside("generate", tmp_path / "run").exception or AssertionError
    assert "n/a (no tokenizer)" in inside("evaluate", tmp_path / "run").stdout
