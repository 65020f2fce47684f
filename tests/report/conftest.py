from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import TORCH_WAS_IMPORTED, environment
from tests.report.example import Example, write_example


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Two runs with everything, of which one has no clip units, and an old one. Nobody changes them."""
    root = tmp_path_factory.mktemp("runs")
    return (
        write_example(root / "muon"),
        write_example(root / "adamw", Example("adamw <b>x</b>", seed=1, final_loss=3.3, lr=0.003, units=0)),
        write_example(root / "old", Example("old", rows=80, columns="old")),
    )


@pytest.fixture(scope="session")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the first import of torch ends the process with a code of its own."""
    return blocked(tmp_path_factory.mktemp("no_torch"), "torch", f"import os\nos._exit({TORCH_WAS_IMPORTED})\n")


@pytest.fixture(scope="session")
def no_plotly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which plotly looks as if it were not installed."""
    return blocked(tmp_path_factory.mktemp("no_plotly"), "plotly", "raise ImportError('not installed')\n")


def blocked(folder: Path, module: str, code: str) -> dict[str, str]:
    (folder / f"{module}.py").write_text(code)
    plain = environment()
    return plain | {"PYTHONPATH": f"{folder}:{plain['PYTHONPATH']}"}
