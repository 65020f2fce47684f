"""SOAP on one matrix: against plain loops that keep the average in the original axes, and where matrices degenerate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from disttrain.optim.soap import soap_flops, soap_state, soap_update

BETAS, EPS, STEPS, LARGE = (0.9, 0.95), 1e-8, 25, 10_000


def gradients(shape: tuple[int, int], steps: int = STEPS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def directions(series: list[Tensor], every: int = 3, max_dim: int = LARGE) -> tuple[list[Tensor], dict[str, Tensor]]:
    state, seen = soap_state(series[0], max_dim=max_dim), []
    for step, gradient in enumerate(series, 1):
        state["step"] = torch.tensor(float(step))
        before = gradient.clone()
        seen.append(soap_update(gradient, state, betas=BETAS, eps=EPS, every=every))
        assert torch.equal(gradient, before)
        assert state["step"].item() == step
    return seen, state


def orthonormal_by_hand(columns: np.ndarray) -> np.ndarray:
    """Gram and Schmidt, twice over for the last digits."""
    result = columns.copy()
    for _ in range(2):
        for k in range(result.shape[1]):
            for j in range(k):
                result[:, k] -= (result[:, j] @ result[:, k]) * result[:, j]
            result[:, k] /= np.sqrt((result[:, k] ** 2).sum())
    return result


def by_hand(series: list[Tensor], every: int, max_dim: int = LARGE) -> list[np.ndarray]:
    """Every side has a full basis, that of a long one is never turned; the average stays in the original axes."""
    beta1, beta2 = BETAS
    rows, columns = series[0].shape
    turned = [size <= max_dim for size in (rows, columns)]
    grams = [np.zeros((rows, rows)), np.zeros((columns, columns))]
    bases = [np.eye(rows), np.eye(columns)]
    average, squares, seen = np.zeros((rows, columns)), np.zeros((rows, columns)), []
    for count, gradient in enumerate(g.numpy() for g in series):
        if count:
            average = beta1 * average + (1 - beta1) * gradient
            projected = np.einsum("ia,ij,jb->ab", bases[0], gradient, bases[1])
            squares = beta2 * squares + (1 - beta2) * projected**2
            mean = np.einsum("ia,ij,jb->ab", bases[0], average, bases[1]) / (1 - beta1**count)
            normal = mean / (np.sqrt(squares / (1 - beta2**count)) + EPS)
            seen.append(np.einsum("ia,ab,jb->ij", bases[0], normal, bases[1]))
        else:
            seen.append(np.zeros((rows, columns)))
        for side, outer in enumerate(
            (np.einsum("ik,jk->ij", gradient, gradient), np.einsum("ki,kj->ij", gradient, gradient))
        ):
            grams[side] = beta2 * grams[side] + (1 - beta2) * outer
            if not turned[side]:
                continue
            if count == 0:
                bases[side] = np.linalg.eigh(grams[side])[1][:, ::-1]
            elif count % every == 0:
                estimates = [bases[side][:, k] @ grams[side] @ bases[side][:, k] for k in range(len(grams[side]))]
                order = sorted(range(len(estimates)), key=lambda k: -estimates[k])
                squares = np.take(squares, order, axis=side)
                bases[side] = orthonormal_by_hand(grams[side] @ bases[side][:, order])
    return seen


def error(seen: Tensor, expected: Tensor) -> float:
    return ((seen - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("shape", "max_dim"), [((6, 6), LARGE), ((5, 9), 5), ((9, 5), 5), ((4, 6), 3)])
@pytest.mark.parametrize("every", [1, 4])
def test_equals_plain_loops(shape: tuple[int, int], max_dim: int, every: int) -> None:
    series = gradients(shape)
    seen, _ = directions(series, every, max_dim)
    expected = [torch.from_numpy(direction) for direction in by_hand(series, every, max_dim)]
    assert not seen[0].any()
    assert not expected[0].any()
    assert max(error(*pair) for pair in zip(seen[1:], expected[1:], strict=True)) < 1e-9


def test_the_first_bases_diagonalise_the_gram_matrices_in_falling_order() -> None:
    (gradient,) = gradients((5, 8), 1)
    _, state = directions([gradient])
    for side, gram in (("left", gradient @ gradient.mT), ("right", gradient.mT @ gradient)):
        basis = state[f"{side}_basis"]
        inside = basis.mT @ gram @ basis
        assert torch.allclose(state[side], (1 - BETAS[1]) * gram, rtol=1e-12, atol=0)
        assert torch.allclose(inside, inside.diagonal().diag(), atol=1e-12)
        assert torch.allclose(inside.diagonal(), torch.linalg.eigvalsh(gram).flip(0), atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (4, 11), (1, 5)])
def test_the_bases_stay_orthogonal(shape: tuple[int, int]) -> None:
    _, state = directions(gradients(shape, 200), every=1)
    for side, size in zip(("left", "right"), shape, strict=True):
        basis = state[f"{side}_basis"]
        assert (basis.mT @ basis - torch.eye(size)).abs().max() < 1e-12


def test_turned_gradients_turn_the_directions() -> None:
    series = gradients((6, 6))
    u, v = (torch.linalg.qr(matrix)[0] for matrix in gradients((6, 6), 2, seed=9))
    plain, _ = directions(series)
    turned, _ = directions([u @ gradient @ v.mT for gradient in series])
    for before, after in zip(plain[1:], turned[1:], strict=True):
        assert error(after, u @ before @ v.mT) < 1e-9


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("shape", [(6, 6), (4, 16), (16, 4), (1, 9), (9, 1), (1, 1)])
def test_rounding_of_the_gradients_stays_rounding(shape: tuple[int, int], every: int) -> None:
    """The null space of the first Gram matrices has no basis of its own: LAPACK's would be one of noise."""
    series, noise = gradients(shape), gradients(shape, seed=1)
    plain, _ = directions(series, every)
    rounded, _ = directions([g * (1 + 1e-15 * n) for g, n in zip(series, noise, strict=True)], every)
    assert max(error(*pair) for pair in zip(rounded[1:], plain[1:], strict=True)) < 1e-10


def test_rank_deficient_gradients_give_nothing_outside_their_space() -> None:
    left, right = gradients((8, 2), 1)[0], gradients((2, 7), 1, seed=1)[0]
    series = [left @ middle @ right for middle in gradients((2, 2), seed=2)]
    seen, _ = directions(series)
    outside = torch.linalg.qr(left, mode="complete")[0][:, 2:]
    for direction in seen[1:]:
        assert direction.abs().max() > 0.01
        assert (outside.mT @ direction).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_gradients_give_zeros(dtype: torch.dtype) -> None:
    seen, state = directions([torch.zeros(4, 6, dtype=dtype)] * 8, every=2)
    assert not any(direction.any() for direction in seen)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_zero_first_gradient_leaves_adam_until_the_bases_turn() -> None:
    series = [torch.zeros(4, 6, dtype=torch.float64), *gradients((4, 6), 6)]
    seen, _ = directions(series, every=3)
    assert torch.allclose(seen[1], series[1].sign(), rtol=1e-6)
    assert all(direction.isfinite().all() and direction.abs().max() > 0.1 for direction in seen[1:])


@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_one_row_or_one_column(shape: tuple[int, int]) -> None:
    for direction in directions(gradients(shape))[0][1:]:
        assert direction.isfinite().all()
        assert direction.abs().max() > 0.01


def test_a_matrix_with_two_long_sides_gets_adam_one_step_late() -> None:
    series = gradients((4, 6))
    seen, state = directions(series, max_dim=3)
    assert set(state) == {"exp_avg", "exp_avg_sq", "step"}
    weight = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=1.0, betas=BETAS, eps=EPS)
    for direction, gradient in zip(seen[1:], series[1:], strict=True):
        before, weight.grad = weight.detach().clone(), gradient
        adam.step()
        assert error(before - weight.detach(), direction) < 1e-12


@pytest.mark.parametrize("max_dim", [LARGE, 5, 3])
def test_a_meta_matrix_has_the_same_state(max_dim: int) -> None:
    real = soap_state(torch.empty(4, 6, dtype=torch.bfloat16), max_dim=max_dim)
    meta = soap_state(torch.empty(4, 6, dtype=torch.bfloat16, device="meta"), max_dim=max_dim)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in meta.items()}
    assert all(tensor.is_meta for tensor in meta.values())
    assert not any(tensor.any() for tensor in real.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    seen, state = directions([gradient.to(dtype) for gradient in gradients((6, 6))])
    assert all(direction.dtype == dtype and direction.isfinite().all() for direction in seen)
    fresh = soap_state(seen[0], max_dim=LARGE)
    assert all(state[k].dtype == dtype and state[k].shape == tensor.shape for k, tensor in fresh.items())


def test_flops_count_the_products() -> None:
    assert soap_flops(3, 5) == 3 * (2 * 3 * 3 * 5 + 2 * 3 * 5 * 5)
