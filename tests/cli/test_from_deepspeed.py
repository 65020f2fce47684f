"""`disttrain config --from-deepspeed` as a user calls it: without torch, and what it prints is a config."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.helpers import disttrain, refused

FILE = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "overlap_comm": True},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
}


def test_what_it_prints_is_a_config(tmp_path: Path, no_torch: dict[str, str]) -> None:
    file, config = tmp_path / "ds.json", tmp_path / "config.toml"
    file.write_text(json.dumps(FILE))
    printed = disttrain("config", "--from-deepspeed", file, "--world", 4, "train.sequence_length=32", env=no_torch)
    assert printed.code == 0, printed
    assert "# zero_optimization.overlap_comm = true: " in printed.out
    config.write_text(printed.out)
    values = json.loads(disttrain("config", config, "--json", env=no_torch).out)
    assert values["train"]["global_batch_tokens"] == 2 * 4 * 32
    assert (values["parallel"]["strategy"], values["optim"]["betas"]) == ("fsdp", [0.9, 0.999])


def test_it_is_refused_in_words(tmp_path: Path, no_torch: dict[str, str]) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(FILE))
    [problem] = refused(disttrain("config", "--from-deepspeed", file, env=no_torch))
    assert problem.startswith(f"error: {file}: the global batch is train_micro_batch_size_per_gpu 2")
    [problem] = refused(disttrain("config", "--from-deepspeed", tmp_path / "none.json", env=no_torch))
    assert "none.json: cannot be read: No such file or directory" in problem
    [problem] = refused(disttrain("config", env=no_torch))
    assert problem == "error: name a TOML file or a run folder"
    [problem] = refused(disttrain("config", "--from-deepspeed", file, "--json", env=no_torch))
    assert "--json shows resolved values" in problem
