"""A checkpoint of any strategy, loaded under any other and on fewer ranks: every bit of the state is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from disttrain.optim.loss_scale import INITIAL_SCALE
from disttrain.testing import RankPool
from tests.parallel.resume_jobs import SCALE, Seen

JOBS = "tests.parallel.resume_jobs:"
STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "hsdp")
LOSS_TOLERANCE = 1e-4
"""Of the third step, in fp16, on other numbers of ranks; two steps of training move the loss a hundred times more."""


class Saved(NamedTuple):
    directory: Path
    seen: Seen


def settings_of(strategy: str, world: int, param_dtype: str = "fp16") -> dict[str, Any]:
    copies = {"dp_replicate": min(2, world)} if strategy == "hsdp" else {}
    return {"strategy": strategy, "param_dtype": param_dtype, **copies}


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Two steps under each strategy on four ranks, in fp16, so that there is a loss scale to keep."""
    runs = {}
    for strategy in STRATEGIES:
        directory = tmp_path_factory.mktemp(strategy)
        ranks = pool.run(JOBS + "save", 4, settings=settings_of(strategy, 4), directory=directory)
        assert_same(ranks[3].state, ranks[0].state)
        runs[strategy] = Saved(directory, ranks[0])
    return runs


def assert_same(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, types and bits."""
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        assert seen[name].dtype == tensor.dtype, name
        assert torch.equal(seen[name], tensor), name


def test_what_is_saved_is_the_state_after_two_steps(saved: dict[str, Saved]) -> None:
    for strategy, (_, seen) in saved.items():
        kinds = {name.rsplit(".", 1)[-1] for name in seen.state if name.startswith("optim.")}
        assert kinds == {"step", "exp_avg", "exp_avg_sq"}, strategy
        assert all(tensor == 2 for name, tensor in seen.state.items() if name.endswith(".step"))
        assert (seen.state["loss_scale.scale"], seen.state["loss_scale.good_steps"]) == (SCALE, 2)


@pytest.mark.parametrize("world", [4, 2, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_checkpoint_loads_bit_by_bit(pool: RankPool, saved: dict[str, Saved], strategy: str, world: int) -> None:
    directories = [run.directory for run in saved.values()]
    ranks = pool.run(JOBS + "load", world, settings=settings_of(strategy, world), directories=directories)
    for rank in ranks:
        for source, loaded in zip(saved.values(), rank, strict=True):
            assert_same(loaded.state, source.seen.state)
            assert loaded.next_loss == pytest.approx(source.seen.next_loss, rel=LOSS_TOLERANCE)


def test_precision_may_change_on_resume(pool: RankPool, saved: dict[str, Saved], tmp_path: Path) -> None:
    """From fp16 to fp32 the scale becomes one; from fp32 to fp16 it starts anew; the rest keeps its bits."""
    pool.run(JOBS + "save", 4, settings=settings_of("zero2", 4, "fp32"), directory=tmp_path)
    [[whole]] = pool.run(JOBS + "load", 1, settings=settings_of("fsdp", 1, "fp32"), directories=[tmp_path])
    [[narrow]] = pool.run(JOBS + "load", 1, settings=settings_of("ddp", 1), directories=[tmp_path])
    assert_same(without_scale(narrow.state), without_scale(whole.state))
    assert (whole.state["loss_scale.scale"], narrow.state["loss_scale.scale"]) == (1.0, INITIAL_SCALE)

    directory, source = saved["hsdp"]
    [[widened]] = pool.run(JOBS + "load", 1, settings=settings_of("fsdp", 1, "fp32"), directories=[directory])
    assert_same(without_scale(widened.state), without_scale(source.state))
    assert widened.state["loss_scale.scale"] == 1.0


def without_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("loss_scale.")}
