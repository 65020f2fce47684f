"""Shampoo on one matrix: against plain loops with roots by another way, and where matrices degenerate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from disttrain.optim.shampoo import shampoo_flops, shampoo_state, shampoo_update

BETAS, EPS, STEPS, LARGE = (0.9, 0.95), 1e-8, 25, 10_000


def gradients(shape: tuple[int, int], steps: int = STEPS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def directions(
    series: list[Tensor], every: int = 3, max_dim: int = LARGE, ridge: float = 1e-6, betas: tuple[float, float] = BETAS
) -> tuple[list[Tensor], dict[str, Tensor]]:
    state, seen = shampoo_state(series[0], max_dim=max_dim), []
    for step, gradient in enumerate(series, 1):
        state["step"] = torch.tensor(float(step))
        before = gradient.clone()
        seen.append(shampoo_update(gradient, state, betas=betas, eps=EPS, ridge=ridge, every=every))
        assert torch.equal(gradient, before)
        assert state["step"].item() == step
    return seen, state


def inverse_root_by_hand(gram: np.ndarray, halvings: int, ridge: float) -> np.ndarray:
    """Square roots by the iteration of Denman and Beavers, one after the other, then the inverse."""
    root = gram + ridge * np.linalg.norm(gram, 2) * np.eye(len(gram))
    for _ in range(halvings):
        scale = np.trace(root)
        square, inverse = root / scale, np.eye(len(gram))
        for _ in range(60):
            square, inverse = (square + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(square)) / 2
        root = square * np.sqrt(scale)
    return np.linalg.inv(root)


def by_hand(series: list[Tensor], every: int, max_dim: int, ridge: float) -> list[np.ndarray]:
    """Every average is a sum over all gradients so far, weighted anew at each step."""
    rows, columns = series[0].shape
    halvings = 2 if max(rows, columns) <= max_dim else 1
    history, seen = [], []
    left, right = np.eye(rows), np.eye(columns)
    for step, gradient in enumerate((g.numpy() for g in series), 1):
        history.append(gradient)
        slow = [BETAS[1] ** (step - 1 - i) for i in range(step)]
        fast = [BETAS[0] ** (step - 1 - i) for i in range(step)]
        if step % every == 1 % every:
            if rows <= max_dim:
                gram = sum(w * g @ g.T for w, g in zip(slow, history, strict=True)) / sum(slow)
                left = inverse_root_by_hand(gram, halvings, ridge)
            if columns <= max_dim:
                gram = sum(w * g.T @ g for w, g in zip(slow, history, strict=True)) / sum(slow)
                right = inverse_root_by_hand(gram, halvings, ridge)
        mean = sum(w * g for w, g in zip(fast, history, strict=True)) / sum(fast)
        squares = sum(w * g**2 for w, g in zip(slow, history, strict=True)) / sum(slow)
        adam, turned = mean / (np.sqrt(squares) + EPS), left @ mean @ right
        seen.append(turned * np.sqrt((adam**2).sum() / (turned**2).sum()))
    return seen


def error(seen: Tensor, expected: Tensor) -> float:
    return ((seen - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("shape", "max_dim"), [((6, 6), LARGE), ((4, 6), LARGE), ((4, 6), 5), ((6, 4), 5), ((4, 6), 3)]
)
@pytest.mark.parametrize("every", [1, 4])
def test_equals_plain_loops(shape: tuple[int, int], max_dim: int, every: int) -> None:
    series = gradients(shape)
    seen, _ = directions(series, every, max_dim, ridge=1e-3)
    expected = [torch.from_numpy(direction) for direction in by_hand(series, every, max_dim, 1e-3)]
    assert max(error(*pair) for pair in zip(seen, expected, strict=True)) < 1e-9


def test_turned_gradients_turn_the_directions_but_not_their_lengths() -> None:
    series = gradients((5, 7))
    u, v = (torch.linalg.qr(gradients((size, size), 1, seed=9)[0])[0] for size in (5, 7))
    plain, _ = directions(series)
    turned, _ = directions([u @ gradient @ v.mT for gradient in series])
    for before, after in zip(plain, turned, strict=True):
        assert error(after / after.norm(), u @ (before / before.norm()) @ v.mT) < 1e-8


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (1, 5)])
def test_the_first_step_is_the_nearest_orthogonal_matrix_of_adams_length(shape: tuple[int, int]) -> None:
    """(G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T; Adam's first step has entries of one."""
    (gradient,) = gradients(shape, 1)
    (seen,), _ = directions([gradient], ridge=1e-13)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    assert seen.norm().item() == pytest.approx(gradient.numel() ** 0.5, rel=1e-6)
    assert error(seen / seen.norm(), u @ v / min(shape) ** 0.5) < 1e-9


@pytest.mark.parametrize("shape", [(6, 6), (4, 16), (16, 4), (1, 9)])
def test_rounding_of_the_gradients_stays_rounding(shape: tuple[int, int]) -> None:
    series, noise = gradients(shape), gradients(shape, seed=1)
    plain, _ = directions(series, every=10)
    rounded, _ = directions([g * (1 + 1e-15 * n) for g, n in zip(series, noise, strict=True)], every=10)
    assert max(error(*pair) for pair in zip(rounded, plain, strict=True)) < 1e-9


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_and_rank_deficient_gradients(dtype: torch.dtype, ridge: float) -> None:
    zeros, state = directions([torch.zeros(4, 6, dtype=dtype)] * 8, every=2, ridge=ridge)
    assert not any(direction.any() for direction in zeros)
    assert all(tensor.isfinite().all() for tensor in state.values())
    series = [column[:, None] * column for column in gradients((1, 6), 8)[0].expand(8, 6)]
    for direction in directions([gradient.to(dtype) for gradient in series], every=2, ridge=ridge)[0]:
        assert direction.isfinite().all()
        assert direction.abs().max() > 0.1


def test_after_a_zero_first_gradient_the_weights_move_before_the_next_roots() -> None:
    series = [torch.zeros(4, 6, dtype=torch.float64), *gradients((4, 6), 3)]
    seen, _ = directions(series, every=100)
    assert not seen[0].any()
    assert error(seen[1] / seen[1].norm(), series[1] / series[1].norm()) < 1e-12
    assert all(direction.norm() > 1 for direction in seen[1:])


@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_one_row_or_one_column(shape: tuple[int, int]) -> None:
    for direction in directions(gradients(shape))[0]:
        assert direction.isfinite().all()
        assert direction.abs().max() > 0.01


def test_roots_are_those_of_the_last_refresh() -> None:
    series = gradients((4, 6), 5)
    kept = [directions(series[:steps], every=3)[1]["left_root"] for steps in range(1, 6)]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[2], kept[3])
    assert torch.equal(kept[3], kept[4])


@pytest.mark.parametrize("max_dim", [LARGE, 5, 3])
def test_a_meta_matrix_has_the_same_state(max_dim: int) -> None:
    real = shampoo_state(torch.empty(4, 6, dtype=torch.bfloat16), max_dim=max_dim)
    meta = shampoo_state(torch.empty(4, 6, dtype=torch.bfloat16, device="meta"), max_dim=max_dim)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in meta.items()}
    assert all(tensor.is_meta for tensor in meta.values())
    assert not any(tensor.any() for tensor in real.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    seen, state = directions([gradient.to(dtype) for gradient in gradients((6, 6))])
    assert all(direction.dtype == dtype and direction.isfinite().all() for direction in seen)
    fresh = shampoo_state(seen[0], max_dim=LARGE)
    assert all(state[k].dtype == dtype and state[k].shape == tensor.shape for k, tensor in fresh.items())


def test_flops_count_the_products() -> None:
    assert shampoo_flops(3, 5) == 2 * (2 * 3 * 3 * 5 + 2 * 3 * 5 * 5)
