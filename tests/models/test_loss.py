"""The summed cross-entropy: masks, precision, and a batch without any label."""

import pytest
import torch

from disttrain.models import cross_entropy_sum


def some_logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def test_only_valid_labels_count() -> None:
    logits = some_logits()
    labels = torch.tensor([[0, -100, 6, -100], [-100, 2, 2, -100]])
    loss = cross_entropy_sum(logits, labels)
    valid = [(0, 0, 0), (0, 2, 6), (1, 1, 2), (1, 2, 2)]
    expected = sum(torch.logsumexp(logits[row, at], 0) - logits[row, at, label] for row, at, label in valid)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[labels == -100] == 0).all()
    assert (logits.grad[labels != -100] != 0).all()


def test_no_label_at_all_gives_zero_and_zero_gradients() -> None:
    logits = some_logits(torch.float32)
    loss = cross_entropy_sum(logits, torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits.grad))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_fp32_or_better(dtype: torch.dtype, kept: torch.dtype) -> None:
    logits, labels = some_logits(dtype), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])
    loss = cross_entropy_sum(logits, labels)
    assert loss.dtype == kept
    exact = cross_entropy_sum(logits.detach().double(), labels)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6 if kept == torch.float32 else 1e-15)
