"""Sampling: which tokens may come, and how likely."""

import math

import pytest
import torch

from disttrain.models.generate import sampling_probabilities

PROBABILITIES = [0.1, 0.4, 0.2, 0.3]
LOGITS = torch.tensor([math.log(p) + 5.0 for p in PROBABILITIES], dtype=torch.float64)


def test_plain_sampling_keeps_the_distribution() -> None:
    torch.testing.assert_close(sampling_probabilities(LOGITS, 1.0, None, None).tolist(), PROBABILITIES)
    sharper = sampling_probabilities(LOGITS, 0.5, None, None)
    squares = [p * p for p in PROBABILITIES]
    torch.testing.assert_close(sharper.tolist(), [s / sum(squares) for s in squares])


def test_temperature_zero_takes_the_largest() -> None:
    assert sampling_probabilities(LOGITS, 0.0, None, None).tolist() == [0, 1, 0, 0]
    assert sampling_probabilities(LOGITS, 0, 3, 0.9).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [0, 1, 0, 0]), (2, [0, 4 / 7, 0, 3 / 7]), (3, [0, 4 / 9, 2 / 9, 3 / 9]), (9, PROBABILITIES)]
)
def test_top_k(top_k: int, kept: list[float]) -> None:
    torch.testing.assert_close(sampling_probabilities(LOGITS, 1.0, top_k, None).tolist(), [float(k) for k in kept])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, [0, 1, 0, 0]),
        (0.39, [0, 1, 0, 0]),
        (0.41, [0, 4 / 7, 0, 3 / 7]),
        (0.69, [0, 4 / 7, 0, 3 / 7]),
        (0.71, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, PROBABILITIES),
    ],
)
def test_top_p_keeps_the_token_that_crosses(top_p: float, kept: list[float]) -> None:
    torch.testing.assert_close(sampling_probabilities(LOGITS, 1.0, None, top_p).tolist(), [float(k) for k in kept])


def test_top_k_and_top_p_together() -> None:
    assert sampling_probabilities(LOGITS, 1.0, 3, 0.41).count_nonzero() == 2
    assert sampling_probabilities(LOGITS, 1.0, 1, 0.99).count_nonzero() == 1


def test_equal_logits_keep_exactly_k() -> None:
    assert sampling_probabilities(torch.zeros(5), 1.0, 2, None).count_nonzero() == 2
