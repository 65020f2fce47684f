"""Newton-Schulz, Muon and NorMuon on whole matrices, against torch, optax and frozen numbers."""

from __future__ import annotations

import copy
from typing import Any

import jax
import optax
import pytest
import torch
from jax import numpy as jnp
from torch import Tensor, nn

from disttrain.config.matrix_groups import ExchangeConfig
from disttrain.optim import matrix_optimizer
from disttrain.optim.muon import lr_scale, normuon_state, normuon_update
from disttrain.optim.newton_schulz import POLYNOMIALS, newton_schulz, newton_schulz_flops, polynomials_of
from disttrain.testing.reference import ReferenceOptimizer
from tests.optim.matrix_jobs import muon_section

SHAPES = [(8, 8), (5, 12), (12, 5), (1, 7), (7, 1)]
TORCHS: dict[str, Any] = {"coefficients": "keller5", "lr_scale": "original", "compute_dtype": "bf16"}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def test_the_frozen_vector_of_torch() -> None:
    """The numbers of PyTorch's own regression test of torch.optim.Muon."""
    torch.manual_seed(42)
    weight = nn.Parameter(torch.randn(8, 4))
    optimizer = matrix_optimizer("muon", [("weight", weight)], lr=0.02, weight_decay=0.1, **TORCHS)
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    expected = [
        [1.938483476638794, 1.463821530342102, 0.8684228658676147, -2.107022762298584],
        [0.6464439034461975, -1.2333816289901733, -0.05520281195640564, -1.594115972518921],
    ]
    assert torch.allclose(weight.detach()[:2], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_torchs_muon(shape: tuple[int, int], scale: str, nesterov: bool) -> None:
    """bf16 in the same order of operations: equal but for the last bits of fp32."""
    ours, theirs = (nn.Parameter(drawn(*shape).float()) for _ in range(2))
    settings = {**TORCHS, "lr_scale": scale, "nesterov": nesterov}
    optimizers = [
        matrix_optimizer("muon", [("weight", ours)], lr=0.03, weight_decay=0.05, **settings),
        torch.optim.Muon([theirs], lr=0.03, weight_decay=0.05, nesterov=nesterov, adjust_lr_fn=scale),
    ]
    for step in range(6):
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = drawn(*shape, seed=step).float()
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_optaxs_muon() -> None:
    """In fp64. Without Nesterov: optax corrects the bias of both terms, which changes their mixture. Large gradients,
    for beside them it does not matter that ours has another eps."""
    weights = {f"w{n}": drawn(*shape, seed=n) for n, shape in enumerate(SHAPES)}
    gradients = [
        {name: 1e6 * drawn(*w.shape, seed=10 * s + n) for n, (name, w) in enumerate(weights.items())} for s in range(8)
    ]
    section = muon_section(lr=0.05, weight_decay=0.1, coefficients="keller5", lr_scale="original", nesterov=False)
    reference = ReferenceOptimizer([(section, list(weights))], weights)
    parameters = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    ours = matrix_optimizer(
        "muon",
        parameters.items(),
        lr=0.05,
        **{key: getattr(section, key) for key in ("weight_decay", "coefficients", "lr_scale", "nesterov")},
    )
    with jax.enable_x64(True):
        # optax keeps weights as [in, out]: transposed, a matrix is the same to Newton-Schulz.
        theirs = {name: jnp.asarray(weight.T.numpy()) for name, weight in weights.items()}
        transformation = optax.contrib.muon(0.05, beta=0.95, nesterov=False, weight_decay=0.1)
        state = transformation.init(theirs)
        for step in gradients:
            reference.step(step)
            for name, gradient in step.items():
                parameters[name].grad = gradient.clone()
            ours.step()
            updates, state = transformation.update(
                {name: jnp.asarray(gradient.T.numpy()) for name, gradient in step.items()}, state, theirs
            )
            theirs = optax.apply_updates(theirs, updates)
        for name, weight in theirs.items():
            expected = torch.as_tensor(weight.tolist(), dtype=torch.float64).T
            assert (reference.weights[name] - expected).abs().max() < 1e-11, name
            assert (parameters[name] - expected).abs().max() < 1e-11, name


@pytest.mark.parametrize(
    ("name", "error"), [("polar_express5", 0.12), ("keller5", 0.25), ("you5", 0.03), ("deepseekv4", 0.001)]
)
def test_every_set_comes_near_the_polar_factor(name: str, error: float) -> None:
    for shape in ((64, 256), (256, 64)):
        matrix = drawn(*shape)
        found = newton_schulz(matrix, POLYNOMIALS[name], torch.float64)
        assert (found - polar(matrix)).norm() / polar(matrix).norm() < error


def test_triples_of_ones_own() -> None:
    matrix = drawn(6, 9)
    own = polynomials_of([(2.0, -1.5, 0.5)] * 40)
    assert (newton_schulz(matrix, own, torch.float64) - polar(matrix)).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (9, 4)])
def test_a_stack_is_its_matrices(shape: tuple[int, int]) -> None:
    stack = torch.stack([drawn(*shape, seed=n) for n in range(3)])
    together = newton_schulz(stack, POLYNOMIALS["you5"], torch.float64)
    alone = torch.stack([newton_schulz(matrix, POLYNOMIALS["you5"], torch.float64) for matrix in stack])
    assert (together - alone).abs().max() < 1e-13


def test_scale_and_rotations_pass_through() -> None:
    matrix, turn = drawn(5, 8), polar(drawn(5, 5, seed=9))
    found = newton_schulz(matrix, POLYNOMIALS["polar_express5"], torch.float64)
    scaled = newton_schulz(1e3 * matrix, POLYNOMIALS["polar_express5"], torch.float64)
    turned = newton_schulz(turn @ matrix, POLYNOMIALS["polar_express5"], torch.float64)
    # Not to rounding: eps stands beside the norm.
    assert (scaled - found).abs().max() < 1e-5
    assert (turned - turn @ found).abs().max() < 1e-12


def test_nothing_is_nothing_and_the_input_stays() -> None:
    assert not newton_schulz(torch.zeros(3, 4), POLYNOMIALS["keller5"], torch.bfloat16).any()
    matrix = drawn(3, 4).bfloat16()
    before = matrix.clone()
    newton_schulz(matrix, POLYNOMIALS["keller5"], torch.bfloat16)
    assert torch.equal(matrix, before)


def test_the_count_of_operations() -> None:
    assert newton_schulz_flops(4, 9, 5) == 20 * 4 * 4 * 9 + 10 * 4**3 == newton_schulz_flops(9, 4, 5)


def test_scales() -> None:
    assert [lr_scale(kind, 32, 8) for kind in ("original", "match_rms_adamw", "spectral", "none")] == [
        pytest.approx(number) for number in (2.0, 0.2 * 32**0.5, 2.0, 1.0)
    ]
    assert lr_scale("original", 8, 32) == 1.0
    # An orthogonal matrix has a root mean square of 1 / sqrt(max(A, B)): matched, it is 0.2.
    found = newton_schulz(drawn(16, 64), POLYNOMIALS["deepseekv4"], torch.float64) * lr_scale("match_rms_adamw", 16, 64)
    assert found.square().mean().sqrt() == pytest.approx(0.2, rel=1e-3)


def test_normuon_levels_rows_and_keeps_the_length() -> None:
    matrix = drawn(6, 10) * torch.logspace(-2, 2, 6, dtype=torch.float64)[:, None]
    state = normuon_state(matrix)
    settings: dict[str, Any] = {"polynomials": POLYNOMIALS["keller5"], "dtype": torch.float64}
    for _ in range(100):
        direction = normuon_update(matrix, state, **settings, beta2=0.9, row_eps=1e-10)
    rows = direction.norm(dim=1)
    assert (rows.max() / rows.min()).item() == pytest.approx(1, rel=1e-4)
    assert direction.norm().item() == pytest.approx(newton_schulz(matrix, **settings).norm().item(), rel=1e-9)
    assert not normuon_update(
        torch.zeros(2, 3), normuon_state(torch.zeros(2, 3)), **settings, beta2=0.9, row_eps=1e-10
    ).any()


@pytest.mark.parametrize("algorithm", ["muon", "normuon"])
def test_equal_matrices_as_a_stack_or_one_by_one(algorithm: str) -> None:
    weights: dict[str, nn.Parameter] = {f"w{n}": nn.Parameter(drawn(5, 3, seed=n)) for n in range(4)}
    others = copy.deepcopy(weights)
    pairs = [
        (parameters, matrix_optimizer(algorithm, parameters.items(), lr=0.1, exchange=ExchangeConfig(batched=batched)))
        for parameters, batched in ((weights, True), (others, False))
    ]
    for step in range(4):
        for parameters, optimizer in pairs:
            for number, parameter in enumerate(parameters.values()):
                parameter.grad = drawn(5, 3, seed=100 * step + number)
            optimizer.step()
    assert all((weights[name] - others[name]).abs().max() < 1e-13 for name in weights)


def test_torchs_schedulers_set_the_rate() -> None:
    weight = nn.Parameter(torch.eye(3))
    optimizer = matrix_optimizer("muon", [("weight", weight)], lr=1.0, weight_decay=0.0, lr_scale="none")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    weight.grad = torch.ones(3, 3)
    assert optimizer.param_groups[0]["lr"] == 0
    optimizer.step()
    assert torch.equal(weight.detach(), torch.eye(3))
    scheduler.step()
