"""The naive references against implementations that we did not write: torch, optax, schedulefree; in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
import pytest
import schedulefree
import torch
from jax import numpy as jnp
from torch import Tensor, nn

from disttrain.config.algorithms import ALGORITHMS
from disttrain.config.groups import Group
from disttrain.testing.reference import ReferenceOptimizer

STEPS = 25
SHAPES = {"matrix": (7, 5), "row": (1, 6), "vector": (4,)}
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def in_fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def section(algorithm: str, **settings: Any) -> Group:
    return ALGORITHMS[algorithm].model_validate(
        {"name": "all", "match": [".*"], "algorithm": algorithm, "lr": 1e-2, **settings}
    )


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def reference(group: Group) -> ReferenceOptimizer:
    optimizer = ReferenceOptimizer([(group, list(SHAPES))], weights())
    for step in range(STEPS):
        optimizer.step(gradients(step))
    return optimizer


def of_torch(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> dict[str, Tensor]:
    parameters = {name: nn.Parameter(weight) for name, weight in weights().items()}
    optimizer = build(list(parameters.values()))
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def of_optax(transformation: Any) -> tuple[dict[str, Any], Any]:
    parameters = {name: jnp.asarray(weight.numpy()) for name, weight in weights().items()}
    state = transformation.init(parameters)
    for step in range(STEPS):
        drawn = {name: jnp.asarray(gradient.numpy()) for name, gradient in gradients(step).items()}
        updates, state = transformation.update(drawn, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return parameters, state


def assert_equal(seen: dict[str, Tensor], theirs: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    for name, weight in seen.items():
        expected = torch.as_tensor(theirs[name].tolist(), dtype=torch.float64)
        assert (weight - expected).abs().max() / expected.abs().max() < tolerance, name


@pytest.mark.parametrize(
    ("group", "build"),
    [
        (section("sgd", weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1)),
        (
            section("momentum", weight_decay=0.1, momentum=0.8),
            lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1, momentum=0.8),
        ),
        (
            section("nesterov", weight_decay=0.1, momentum=0.8),
            lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1, momentum=0.8, nesterov=True),
        ),
        (section("rmsprop", weight_decay=0.1), lambda p: torch.optim.RMSprop(p, lr=1e-2, weight_decay=0.1)),
        (
            section("adam", weight_decay=0.1),
            lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)),
        ),
        (
            section("adamw", weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)),
        ),
        # Where no gradient is zero torch's floor under the second moment and the paper's eps1 are both without effect.
        (
            section("adafactor", lr=0.3, weight_decay=0.1),
            lambda p: torch.optim.Adafactor(p, lr=0.3, weight_decay=0.1, eps=(1e-30, 1e-3)),
        ),
    ],
    ids=lambda value: value.algorithm if isinstance(value, Group) else "",
)
def test_torch(group: Group, build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    assert_equal(reference(group).weights, of_torch(build))


def test_lion_is_that_of_optax() -> None:
    group = section("lion", weight_decay=0.3)
    assert_equal(reference(group).weights, of_optax(optax.lion(1e-2, b1=0.9, b2=0.99, weight_decay=0.3))[0])


@pytest.mark.parametrize("warmup", [None, 10])
def test_ademamix_is_that_of_optax(warmup: int | None) -> None:
    """Without warm-ups: optax leaves them to schedules, which are given by the formulas of the paper's code."""
    group = section("ademamix", weight_decay=0.1, alpha_warmup_steps=warmup or 0)
    alpha: Any = 5.0 if warmup is None else lambda count: 5.0 * jnp.minimum(1.0, (count + 1) / warmup)
    theirs = optax.contrib.ademamix(1e-2, b1=0.9, b2=0.999, b3=0.9999, alpha=alpha, eps=1e-8, weight_decay=0.1)
    assert_equal(reference(group).weights, of_optax(theirs)[0])


def test_adafactor_is_that_of_optax() -> None:
    """optax has no relative step of its own when it is given a rate: ours is min(lr, 1 / sqrt(t)).

    It computes the decay of the second moment in fp32 whatever the weights are in, so nearer than that it cannot be;
    torch's Adafactor above is met to rounding.
    """
    group = section("adafactor", lr=0.3, weight_decay=0.0)
    theirs = optax.adafactor(
        lambda count: jnp.minimum(0.3, (count + 1.0) ** -0.5),
        min_dim_size_to_factor=1,
        multiply_by_parameter_scale=True,
        eps=1e-30,
    )
    assert_equal(reference(group).weights, of_optax(theirs)[0], tolerance=1e-7)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_schedule_free_is_the_authors(power: float) -> None:
    group = section("schedule_free_adamw", weight_decay=0.1, weight_power=power)
    ours = reference(group)
    parameters = {name: nn.Parameter(weight) for name, weight in weights().items()}
    theirs = schedulefree.AdamWScheduleFree(parameters.values(), lr=1e-2, weight_decay=0.1, r=power, foreach=False)
    theirs.train()
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient
        theirs.step()
    assert_equal(ours.weights, {name: parameter.detach().clone() for name, parameter in parameters.items()})
    theirs.eval()
    assert_equal(ours.evaluation_weights(), {name: parameter.detach() for name, parameter in parameters.items()})


def test_schedule_free_is_that_of_optax() -> None:
    group = section("schedule_free_adamw", weight_decay=0.0)
    theirs = optax.contrib.schedule_free_adamw(1e-2, b1=0.9, b2=0.999, eps=1e-8)
    parameters, state = of_optax(theirs)
    ours = reference(group)
    assert_equal(ours.weights, parameters)
    assert_equal(ours.evaluation_weights(), optax.contrib.schedule_free_eval_params(state, parameters))
