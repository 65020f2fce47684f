"""Two ranks under the launchers of accelerate and deepspeed, where these are installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.helpers import disttrain, environment, finish, run, status
from tests.launching.namespaces import cluster, needs_namespaces

pytestmark = pytest.mark.timeout(180)


def test_accelerate(config: Path, tmp_path: Path) -> None:
    """Its launcher asks for no GPU; only its config must not say that there is none."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate comes with the extra [accelerate]")
    written = tmp_path / "accelerate.yaml"
    options = ("--target", "accelerate", "--nproc", 2, "--output", written)
    assert disttrain("launch", config, 'device="auto"', *options).code == 0
    command = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", written, "-m", "disttrain", "train")
    ended = run(*command, config, f"run.dir={tmp_path / 'run'}", "train.steps=3", "engine=accelerate")
    assert ended.code == 0, ended
    assert status(tmp_path / "run") == {"state": "completed", "step": 3}
    assert "AcceleratedOptimizer" in ended.out
    assert "rows over 2" in ended.out


def test_deepspeed_through_accelerate(config: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("accelerate") is None or importlib.util.find_spec("deepspeed") is None:
        pytest.skip("accelerate and deepspeed come with the extras [accelerate,deepspeed]")
    options = ("--use_deepspeed", "--zero_stage", 2, "--gradient_clipping", 1.0, "--num_processes", 2)
    command = (sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "disttrain", "train", config)
    settings = (f"run.dir={tmp_path / 'run'}", "train.steps=3", "engine=deepspeed")
    env = environment(DS_ACCELERATOR="cpu")
    ended = run(*command, *settings, "deepspeed.stage=2", env=env)
    assert ended.code == 0, ended
    assert status(tmp_path / "run") == {"state": "completed", "step": 3}
    assert "zero.stage_1_and_2.DeepSpeedZeroOptimizer" in ended.out
    assert "elements over 2" in ended.out
    refused = run(*command, *settings, "deepspeed.stage=3", env=env)
    assert "ZERO_STAGE = 2 from accelerate, the stage of parallel.strategy is 3 here" in refused.err


@needs_namespaces
def test_accelerate_on_two_nodes(config: Path, tmp_path: Path) -> None:
    """The two commands that the head of its config says, on nodes whose names nobody can resolve."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate comes with the extra [accelerate]")
    written, folder = tmp_path / "accelerate.yaml", f"run.dir={tmp_path / 'run'}"
    with cluster(2) as nodes, ExitStack() as stack:
        head = nodes[0].address
        options = ("--nodes", 2, "--nproc", 1, "--head", head, "--output", written)
        assert disttrain("launch", config, 'device="auto"', "--target", "accelerate", *options).code == 0
        port = re.findall(r"main_process_port: (\d+)", written.read_text())[0]
        look = (sys.executable, "-m", "disttrain.launching.node", "--head", head, "--port", port, "--nodes", 2, "--")
        launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", written)
        train = ("--main_process_ip", head, "-m", "disttrain", "train", config, folder, "train.steps=3")
        agents = [
            stack.enter_context(node.started(*look, *launcher, "--machine_rank", rank, *train, env=environment()))
            for rank, node in enumerate(nodes)
        ]
        ended = [finish(agent) for agent in agents]
    assert [each.code for each in ended] == [0, 0], ended
    assert status(tmp_path / "run") == {"state": "completed", "step": 3}
    assert "rows over 2" in ended[0].out


def test_deepspeed(config: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None or shutil.which("deepspeed") is None:
        pytest.skip("deepspeed comes with the extra [deepspeed]")
    script = tmp_path / "deepspeed.sh"
    assert disttrain("launch", config, "--target", "deepspeed", "--nproc", 2, "--output", script).code == 0
    # The launcher looks for its own interpreter on PATH, and counts GPUs unless it is told of CPUs.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(RUN_DIR=str(tmp_path / "run"), DS_ACCELERATOR="cpu", PATH=path)
    ended = run("bash", script, "train.steps=3", "engine=deepspeed", env=env)
    assert ended.code == 0, ended
    assert status(tmp_path / "run") == {"state": "completed", "step": 3}
    assert "DeepSpeedZeroOptimizer_Stage3" in ended.out
    assert "elements over 2" in ended.out
