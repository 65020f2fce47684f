from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import NO_TORCH, TORCH_WAS_IMPORTED, Ended, disttrain, environment

TINY = """
device = "cpu"

[model]
n_layers = 1
d_model = 16
n_heads = 2

[data]
source = "synthetic"
tokenizer = "bytes"
cache_dir = "{cache}"

[train]
steps = 40
global_batch_tokens = 256
microbatch_size = 2
sequence_length = 32

[schedule]
warmup_steps = 4
horizon_steps = 40

[checkpoint]
every = 20

[monitor]
log_every = 1
evaluate_every = 20
evaluate_tokens = 512
sample_tokens = 8
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that trains 40 steps in about a second. `train.steps` may change: the schedule does not follow it."""
    folder = tmp_path_factory.mktemp("config")
    file = folder / "tiny.toml"
    file.write_text(TINY.format(cache=folder / "cache"))
    return file


@pytest.fixture(scope="session")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the first import of torch ends the process with a code of its own."""
    folder = tmp_path_factory.mktemp(NO_TORCH)
    (folder / "torch.py").write_text(f"import os\nos._exit({TORCH_WAS_IMPORTED})\n")
    plain = environment()
    return plain | {"PYTHONPATH": f"{folder}:{plain['PYTHONPATH']}"}


@pytest.fixture(scope="session")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The run folder and the output of 40 steps on two fsdp ranks. To be copied before anything is changed in it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, disttrain("train", config, "--nproc", 2, f"run.dir={folder}")


@pytest.fixture(scope="session")
def finished_folder(finished: tuple[Path, Ended]) -> Path:
    folder, ended = finished
    assert ended.code == 0, ended
    return folder
