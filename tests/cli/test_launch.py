"""The script that starts torchrun on this machine, and the command that writes the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import ROOT, disttrain, environment, losses, refused, run, status

SCRIPT = ROOT / "launch/local.sh"


@pytest.mark.parametrize("arguments", [[], ["fsdp"]])
def test_usage(arguments: list[str]) -> None:
    ended = run(SCRIPT, *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert "usage: launch/local.sh STRATEGY NPROC [key.path=value ...]" in ended.err


def test_two_processes(config: Path, finished_folder: Path, tmp_path: Path) -> None:
    env = environment(CONFIG=str(config), RANK="7", MASTER_ADDR="203.0.113.1")
    ended = run("env", "-C", tmp_path, SCRIPT, "ddp", 2, "train.steps=3", env=env)
    assert (ended.code, ended.err) == (0, "")
    folder = tmp_path / "runs/tiny-ddp"
    assert status(folder) == {"state": "completed", "step": 3}
    expected = {step: loss for step, loss in losses(finished_folder).items() if step <= 3}
    assert losses(folder) == pytest.approx(expected, rel=1e-6)


def test_a_script_for_a_cluster_needs_no_torch(no_torch: dict[str, str]) -> None:
    """Refused and rendered alike, and the exit codes tell them apart."""
    command = ("launch", ROOT / "configs/quickstart.toml", "--target", "slurm", "--nodes", 3, "--nproc", 2)
    (line,) = refused(disttrain(*command, env=no_torch))
    assert line.startswith("error: 3 nodes x 2 processes = 6: train.global_batch_tokens = 2048 is not a multiple")
    ended = disttrain(*command, "train.global_batch_tokens=3072", "--dry-run", env=no_torch)
    assert (ended.code, ended.err) == (0, "")
    assert "#SBATCH --nodes=3\n" in ended.out
    assert "train.global_batch_tokens=3072" in ended.out


def test_unknown_target() -> None:
    (line,) = refused(disttrain("launch", ROOT / "configs/quickstart.toml", "--target", "pbs"))
    assert line.startswith("error: --target 'pbs': must be one of local, torchrun, slurm,")


def test_written_to_a_file(tmp_path: Path) -> None:
    target = ("launch", ROOT / "configs/quickstart.toml", "--target", "deepspeed", "--nodes", 2)
    ended = disttrain(*target, "--output", tmp_path / "start.sh")
    assert (ended.code, ended.out) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostfile.example", "start.sh"]
    assert (tmp_path / "start.sh").stat().st_mode & 0o111
    (line,) = refused(disttrain(*target, "--output", tmp_path / "no/start.sh"))
    assert "No such file or directory; name a file in a folder that is there" in line


def test_local_is_train_here(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ("launch", config, f"run.dir={folder}", "train.steps=2", "--nproc", 1)
    ended = disttrain(*command, "--dry-run")
    assert ended.out == f"disttrain train {config} run.dir={folder} train.steps=2 --nproc 1\n"
    assert not folder.exists()
    ended = disttrain(*command)
    assert (ended.code, ended.err) == (0, "")
    assert status(folder) == {"state": "completed", "step": 2}
    (line,) = refused(disttrain(*command, "--output", tmp_path / "x.sh"))
    assert "local starts here and writes nothing" in line


def test_slurm_submits(tmp_path: Path) -> None:
    """To whatever is called sbatch; a copy of the script lies in the run folder."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "sbatch").write_text('#!/bin/sh\ncat > "$(dirname "$0")/script"\necho Submitted batch job 7\n')
    (bin_folder / "sbatch").chmod(0o755)
    folder = tmp_path / "run"
    command = ("launch", ROOT / "configs/quickstart.toml", "--target", "slurm-native", f"run.dir={folder}")
    ended = disttrain(*command, env=environment(PATH=f"{bin_folder}:/usr/bin:/bin"))
    assert (ended.code, ended.out, ended.err) == (0, "Submitted batch job 7\n", "")
    assert (bin_folder / "script").read_text() == (folder / "slurm-native.sbatch").read_text()
    (line,) = refused(disttrain(*command, env=environment(PATH=str(tmp_path))))
    assert line.startswith("error: sbatch is not on PATH: submit from a login node of the cluster")
