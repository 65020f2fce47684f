"""Fixtures that every test may use."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from disttrain.testing import RankPool
from disttrain.testing.tiny import write_tiny

# Programs that came with the extras (shellcheck, deepspeed), also where the environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none, in one place."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Rank processes that live as long as the test session; they start when the first job needs them."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that trains 40 steps in about a second. `train.steps` may change: the schedule does not follow it."""
    return write_tiny(tmp_path_factory.mktemp("config"))
