"""States in bf16 and int8: what is stored, that no layout changes a bit of it, and what it does to training."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.errors import UserError
from disttrain.optim import state_precision
from disttrain.optim.state_precision import LowPrecisionStates
from disttrain.testing import RankPool
from tests.optim.state_precision_jobs import Toys, optimizer_of, train

JOBS = "tests.optim.state_precision_jobs:"
LAYOUTS: list[tuple[dict[str, Any], int]] = [
    ({"strategy": "ddp"}, 2),
    ({"strategy": "fsdp"}, 2),
    ({"strategy": "fsdp"}, 3),
    ({"strategy": "hsdp", "dp_replicate": 2}, 4),
]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize(("settings", "world"), LAYOUTS, ids=str)
def test_no_layout_changes_a_bit(pool: RankPool, settings: dict[str, Any], world: int, dtype: str) -> None:
    for algorithm in ("lion", "momentum"):  # multiplications and additions only: no layout rounds them otherwise
        alone = train(toys := Toys(), optimizer_of(toys, algorithm, dtype), 4)
        for seen in pool.run(JOBS + "sharded", world, settings=settings, algorithm=algorithm, dtype=dtype):
            assert seen.keys() == alone.keys()
            assert [name for name, tensor in alone.items() if not torch.equal(seen[name], tensor)] == []


def test_what_is_stored() -> None:
    stored = train(toys := Toys(), optimizer_of(toys, "adamw", "bf16"), 1)
    assert {name: t.dtype for name, t in stored.items() if ".exp_avg" in name and t.dtype != torch.bfloat16} == {}
    stored = train(toys := Toys(), optimizer_of(toys, "adamw", "int8"), 1)
    assert (stored["large.exp_avg.codes"].dtype, stored["large.exp_avg.codes"].shape) == (torch.uint8, (70, 300))
    assert (stored["large.exp_avg.scales"].dtype, stored["large.exp_avg.scales"].shape) == (torch.float32, (70, 2))
    assert stored["one_row.exp_avg_sq.scales"].shape == (1, 17)
    assert stored["small.exp_avg"].dtype == stored["vector.exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.01), ("int8", 0.02)])
def test_the_weights_stay_near_those_of_wide_states(dtype: str, tolerance: float) -> None:
    """Root mean square of the difference after 60 steps, against how far the weights went."""
    start = dict(Toys().named_parameters())
    wide = train(toys := Toys(), optimizer_of(toys, "adamw", "parameter"), 60)
    narrow = train(toys := Toys(), optimizer_of(toys, "adamw", dtype), 60)
    for name, before in start.items():
        off, way = (narrow[name] - wide[name]).norm(), (wide[name] - before.detach()).norm()
        assert off / way < tolerance, name


def test_plain_rounding_would_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second moment of ones fed with 1.5: each step adds less than half of bf16's spacing."""

    def second_moment() -> float:
        parameter = nn.Parameter(torch.zeros(64, 64))
        inner = torch.optim.AdamW([parameter], lr=0.0, betas=(0.9, 0.999), fused=True)
        inner.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.ones_like(parameter),
        }
        narrow = LowPrecisionStates(inner, {parameter: "weight"}, ("exp_avg", "exp_avg_sq"), "bf16", 0)
        for _ in range(200):
            parameter.grad = torch.full_like(parameter, 1.5**0.5)
            narrow.step()
        return narrow.state[parameter]["exp_avg_sq"].double().mean().item()

    expected = 1.5 - 0.5 * 0.999**200
    assert abs(second_moment() - expected) < 0.01
    monkeypatch.setattr(state_precision, "round_to_bf16", lambda source, key, offset: source.bfloat16())
    assert second_moment() == 1.0


def test_small_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(toys := Toys(), optimizer_of(toys, "lion", "bf16"), 3)
    monkeypatch.setattr(state_precision, "CHUNK_BYTES", 1)
    chunked = train(toys := Toys(), optimizer_of(toys, "lion", "bf16"), 3)
    assert all(torch.equal(chunked[name], tensor) for name, tensor in whole.items())


def test_groups_are_whole_again_after_an_error() -> None:
    optimizer = optimizer_of(toys := Toys(), "adamw", "bf16")
    before = [list(group["params"]) for group in optimizer.param_groups]
    toys.large.grad = torch.ones(70, 300)
    (narrow,) = optimizer.optimizers
    narrow.inner.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert [list(group["params"]) for group in optimizer.param_groups] == before


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    optimizer = optimizer_of(toys := Toys(), "adamw", "bf16")
    toys.small.grad = torch.ones(3, 5)
    optimizer.step()
    assert float(optimizer.state[toys.small]["rounding_step"]) == 1
    assert float(optimizer.state[toys.large]["rounding_step"]) == 0


def test_int8_needs_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"pip install 'disttrain\[lowbit\]'"):
        optimizer_of(Toys(), "adamw", "int8")
