"""Functions of the user's as optimizers: exact on every layout, and refused in one line where they cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disttrain.config.matrix_groups import CustomMatrix
from disttrain.errors import UserError
from disttrain.optim.matrix_updates import matrix_update
from disttrain.testing import RankPool
from disttrain.testing.optimizer_parity import SYNTHETIC_TOLERANCE, TRAINING_TOLERANCE
from disttrain.testing.pool import JobError

PARITY = "disttrain.testing.matrix_parity:"
FUNCTIONS = "tests.optim.matrix_functions:"
GOOD = ("rows_by_their_mean", "Whitened", "Stacked")


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(("world", "layout"), [(4, "fsdp"), (3, "ddp"), (4, "hsdp spread")])
def test_what_one_process_computes(pool: RankPool, name: str, world: int, layout: str) -> None:
    job: dict[str, Any] = {"device": "cpu", "layout": layout, "algorithm": FUNCTIONS + name}
    [drawn] = pool.run(PARITY + "synthetic_job", world, 60, **job)[0].values()
    assert drawn <= SYNTHETIC_TOLERANCE
    [trained] = pool.run(PARITY + "training_job", world, 60, **job)[0].values()
    assert trained <= TRAINING_TOLERANCE


def custom(name: str, **arguments: Any) -> CustomMatrix:
    algorithm = name if ":" in name else FUNCTIONS + name
    return CustomMatrix.model_validate(
        {"name": "all", "match": (".*",), "algorithm": algorithm, "arguments": arguments}
    )


def test_arguments_and_costs_are_the_functions_own() -> None:
    update = matrix_update(custom("Whitened", beta=0.5), torch.float32, torch.device("cpu"))
    assert update.flops(3, 5) == 4 * 9 * 5
    state = {"gram": torch.zeros(2, 2)}
    update("w", torch.eye(2), state, torch.tensor(1.0))
    assert torch.equal(state["gram"], torch.eye(2) / 2)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("transposed", {}, "its update returned (3, 7) for a matrix of shape (7, 3)"),
        ("nothing", {}, "its update returned NoneType for a matrix of shape (7, 3)"),
        ("raising", {}, "its update raised ArithmeticError on 7x3: no such luck"),
        ("random", {}, "two runs on the same 7x3 matrices differ: it must be pure"),
        ("remembering", {}, "its update made the state last, which initial_state did not"),
        ("Growing", {}, "its update made the state gram (14, 7), and initial_state (7, 7)"),
        ("Inconsistent", {}, "initial_state gives other real for a meta tensor"),
        ("Unstackable", {}, "it says batched, and a stack of 7x3 matrices gives others than one by one"),
        ("NUMBER", {}, "is neither a function of Python's nor a class without arguments"),
        ("Reserved", {}, "initial_state makes momentum_buffer, which disttrain has: take another name"),
        ("Free", {}, "flops(7, 3) is 0.0; it must be positive"),
        ("Whitened", {"betta": 1}, "takes no betta; it takes beta"),
        ("transposed", {"x": 1}, "takes no x; it takes nothing besides the matrix and its state"),
        (
            "Whitenedd",
            {},
            "tests.optim.matrix_functions has no Whitenedd; did you mean tests.optim.matrix_functions:Whitened?",
        ),
        (
            "nowhere.at_all:update",
            {},
            "cannot import nowhere.at_all: No module named 'nowhere'; install it, or set PYTHONPATH",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(name: str, arguments: dict[str, Any], said: str) -> None:
    config = custom(name, **arguments)
    with pytest.raises(UserError) as raised:
        matrix_update(config, torch.float32, torch.device("cpu"))
    (problem,) = raised.value.problems
    assert said in problem
    assert problem.startswith(config.algorithm)
    assert "\n" not in problem


def test_a_mistake_that_only_an_owner_sees_names_the_matrix_and_nobody_waits(pool: RankPool) -> None:
    job: dict[str, Any] = {"device": "cpu", "layout": "fsdp", "algorithm": FUNCTIONS + "Late"}
    with pytest.raises(JobError, match=r"wide: its update returned \(2, 10\) for a matrix of shape \(3, 10\)"):
        pool.run(PARITY + "synthetic_job", 3, 60, **job)
