from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from disttrain.testing import RankPool
from tests.cli.conftest import no_torch

__all__ = ["cache", "engine_pool", "no_torch"]


@pytest.fixture(scope="package")
def engine_pool() -> Iterator[RankPool]:
    """Ranks of their own: both packages change the processes that import them."""
    for package in ("deepspeed", "accelerate"):
        if find_spec(package) is None:
            pytest.skip(f"{package} comes with the extra [{package}]")
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="package")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
