"""Optimizers by their dotted name: on shards as in one process, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.checkpoint.state import training_state
from disttrain.config.clipping import NoClip
from disttrain.config.groups import Custom
from disttrain.errors import UserError
from disttrain.optim.adapter import AdaptedOptimizer, self_test
from disttrain.testing import RankPool
from disttrain.testing.optimizer_parity import STRATEGIES, optim_of, tensor_error
from tests.optim.resume_jobs import Run, whole

CLASSES = {
    "torch.optim.NAdam": {"momentum_decay": 1e-3},
    "torch.optim.RAdam": {},
    "torch.optim.Adagrad": {},
    "torch.optim.Adamax": {"betas": [0.8, 0.9]},
    "tests.optim.foreign.Signum": {"beta": 0.8},
}


def custom(algorithm: str, **settings: Any) -> Custom:
    return Custom(name="all", match=(".*",), algorithm=algorithm, clip=NoClip(), **settings)


def optim(name: str) -> Any:
    own: dict[str, Any] = {"lr": 1e-2, "arguments": CLASSES[name]}
    config = optim_of(name, own, "square|vector", {"kind": "none"})
    if name.startswith("torch"):
        return config
    plain = [group.model_copy(update={"weight_decay": 0.0}) for group in config.groups]
    return config.model_copy(update={"groups": tuple(plain)})


@pytest.mark.parametrize("name", CLASSES)
def test_the_self_test_lets_element_wise_classes_pass(name: str) -> None:
    self_test(custom(name, arguments=CLASSES[name]))


@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("ddp", 2)])
def test_shards_are_updated_as_the_whole_is(pool: RankPool, strategy: str, world: int) -> None:
    optims = {name: optim(name) for name in CLASSES}
    job = {"settings": STRATEGIES[strategy], "optims": optims}
    seen = pool.run("tests.optim.adapter_jobs:train", world, 60, **job)[0]
    for name, config in optims.items():
        alone = Run(1, STRATEGIES["ddp"], config)
        alone.train(range(5))
        for tensor, weight in whole(alone.toys).items():
            assert tensor_error(tensor, seen[name][tensor], weight) < 1e-12, (name, tensor)


def test_looking_at_the_state_before_the_first_step_leaves_no_trace() -> None:
    looked, blind = (Run(1, STRATEGIES["ddp"], optim("tests.optim.foreign.Signum")) for _ in range(2))
    state = training_state(looked.toys, looked.optimizer)
    assert {"optim.square.count", "optim.square.start", "optim.square.average"} <= state.keys()
    for run in (looked, blind):
        run.train(range(3))
    assert all(torch.equal(weight, whole(blind.toys)[name]) for name, weight in whole(looked.toys).items())
    assert float(looked.optimizer.state[looked.toys.square]["count"]) == 3


def test_a_load_is_gone_on_from(tmp_path: Path) -> None:
    first, second, through = (Run(1, STRATEGIES["ddp"], optim("tests.optim.foreign.Signum")) for _ in range(3))
    first.train(range(2))
    kept = {name: tensor.detach().clone() for name, tensor in training_state(first.toys, first.optimizer).items()}
    with torch.no_grad():
        for name, tensor in training_state(second.toys, second.optimizer).items():
            tensor.copy_(kept[name])
    second.optimizer.loaded()
    second.train(range(2, 5))
    through.train(range(5))
    assert all(torch.equal(weight, whole(through.toys)[name]) for name, weight in whole(second.toys).items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": "nowhere.Adam"}, "nowhere.Adam: cannot import nowhere: No module named 'nowhere'"),
        ({"algorithm": "torch.optim.NAdm"}, "NAdm is not in torch.optim; did you mean torch.optim.NAdam?"),
        ({"algorithm": "tests.optim.foreign.not_a_class"}, "not_a_class is no subclass of torch.optim.Optimizer"),
        ({"algorithm": "torch.optim.NAdam", "arguments": {"beta": 1}}, "takes no beta; it takes lr, betas"),
        (
            {"algorithm": "torch.optim.NAdam", "arguments": {"betas": [2, 0]}},
            "cannot be made: ValueError: Inv",
        ),
        ({"algorithm": "tests.optim.foreign.Signum", "weight_decay": 0.1}, "takes no weight_decay; leave it out"),
        ({"algorithm": "tests.optim.foreign.Normalised"}, "a tensor of shape (7, 3) differs by"),
        ({"algorithm": "tests.optim.foreign.NeedsClosure"}, "TypeError in three steps on toy tensors"),
        ({"algorithm": "torch.optim.LBFGS"}, "LBFGS"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        self_test(custom(**settings))
    (problem,) = raised.value.problems
    assert said in problem
    assert problem.startswith(settings["algorithm"])
    assert "\n" not in problem


def test_a_state_that_no_checkpoint_can_hold_is_named() -> None:
    weight = nn.Parameter(torch.ones(3))
    config = custom("tests.optim.foreign.Remembering")
    optimizer = AdaptedOptimizer([{"params": [weight], "lr": 0.1, "weight_decay": 0.0, "config": config}])
    with pytest.raises(UserError, match="its state 'history' is a list"):
        _ = optimizer.state
