"""Sampling: which tokens may come, how often the model is asked, and that a seed repeats."""

import math

import pytest
import torch
from torch import Tensor, nn

from disttrain.models.generate import generate_tokens, sampling_probabilities

CPU = torch.device("cpu")
PROBABILITIES = [0.1, 0.4, 0.2, 0.3]
LOGITS = torch.tensor([math.log(p) + 5.0 for p in PROBABILITIES], dtype=torch.float64)


class Successor(nn.Module):
    """Says, with little doubt, that the next token is the last one plus one; remembers the windows that it saw."""

    def __init__(self, sharpness: float = 3.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.windows: list[list[int]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.windows.append(tokens[0].tolist())
        return self.sharpness * nn.functional.one_hot((tokens + 1) % 10, 10).float()


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


@pytest.mark.parametrize("count", [0, 1, 6])
def test_exactly_as_many_forwards_as_tokens(count: int) -> None:
    model = Successor()
    assert len(generate_tokens(model, [1], count, max_length=8, device=CPU)) == len(model.windows) == count


def test_the_window_slides_over_a_long_prompt() -> None:
    model = Successor()
    made = generate_tokens(model, [9, 8, 7, 6, 5], 3, max_length=4, device=CPU, temperature=0.0)
    assert made == [6, 7, 8]
    assert model.windows == [[8, 7, 6, 5], [7, 6, 5, 6], [6, 5, 6, 7]]


def test_a_seed_repeats_and_leaves_the_global_state_alone() -> None:
    def made(seed: int) -> list[int]:
        return generate_tokens(Successor(0.5), [1], 24, max_length=8, device=CPU, temperature=1.5, seed=seed)

    state = torch.get_rng_state()
    first = made(0)
    torch.rand(3)
    assert made(0) == first
    assert made(1) != first
    torch.set_rng_state(state)
    made(2)
    assert torch.equal(torch.get_rng_state(), state)
