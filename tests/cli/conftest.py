from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import NO_TORCH, TORCH_WAS_IMPORTED, Ended, disttrain, environment


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
