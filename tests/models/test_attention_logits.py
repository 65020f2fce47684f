"""The largest attention logit, three ways, beside a naive matrix of scores."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.models.attention_logits import (
    LogitWatch,
    attend_with_bound,
    attend_with_exact,
    attend_with_flex,
    largest_logits,
)

SHAPES = [(2, 3, 3, 9, 8), (1, 6, 2, 300, 8), (2, 5, 1, 129, 4)]
"""batch, heads, key heads, length, width: lengths beside and beyond a block of queries."""


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, ...]:
    batch, heads, shared, length, width = shape
    generator = torch.Generator().manual_seed(1)
    sizes = [(batch, h, length, width) for h in (heads, shared, shared)]
    return tuple(3 * torch.randn(size, generator=generator, dtype=dtype).to(device) for size in sizes)


def naive(q: Tensor, k: Tensor) -> Tensor:
    """[batch, heads, length, length] masked scores."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_and_bound(shape: tuple[int, ...]) -> None:
    q, k, v = drawn(shape)
    expected = naive(q, k).amax((0, 2, 3))
    torch.testing.assert_close(largest_logits(q, k), expected, rtol=1e-13, atol=0)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    y, exact = attend_with_exact(q, k, v)
    z, bound = attend_with_bound(q, k, v)
    assert torch.equal(y, plain)
    assert torch.equal(z, plain)
    assert torch.equal(exact, largest_logits(q, k))
    torch.testing.assert_close(bound, torch.logsumexp(naive(q, k), -1).amax((0, 2)), rtol=1e-13, atol=0)
    assert (bound >= expected).all()
    assert (bound <= expected + math.log(shape[3])).all()


def test_the_bound_is_the_maximum_where_it_matters() -> None:
    """A head with a logit of a hundred looks at one key."""
    q, k, v = drawn(SHAPES[1])
    q = q * (100 / naive(q, k).amax((0, 2, 3)))[:, None, None]
    _, bound = attend_with_bound(q, k, v)
    torch.testing.assert_close(bound, torch.full((6,), 100.0, dtype=torch.float64), rtol=1e-2, atol=0)


def test_exact_does_not_overflow_where_attention_does_not() -> None:
    """In fp16 the scores before their scale would."""
    q, k, _ = (t.half() for t in drawn(SHAPES[0], torch.float32))
    q = q * (10_000 * math.sqrt(8) / naive(q.float(), k.float()).amax()).half()
    assert largest_logits(q, k).isfinite().all()
    assert largest_logits(q, k).max() > 25_000


def test_gradients_are_those_of_plain_attention_and_the_watch_holds_no_graph() -> None:
    gradients = []
    for method in ("bound", "exact", None):
        q, k, v = (t.requires_grad_() for t in drawn(SHAPES[0]))
        watch = LogitWatch(3, method or "exact", torch.device("cpu"), torch.float64)
        y = watch.attend(q, k, v) if method else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.sin().sum().backward()
        assert not watch.maxima.requires_grad
        gradients.append([t.grad for t in (q, k, v)])
    for seen in gradients[:2]:
        torch.testing.assert_close(seen, gradients[2], rtol=1e-12, atol=1e-14)


def test_the_watch_keeps_the_largest_of_all_passes_until_it_is_reset() -> None:
    q, k, v = drawn(SHAPES[0])
    watch = LogitWatch(3, "exact", torch.device("cpu"), torch.float64)
    seen = [largest_logits(scale * q, k) for scale in (0.5, 2.0, 1.0)]
    for scale in (0.5, 2.0, 1.0):
        watch.attend(scale * q, k, v)
    assert torch.equal(watch.maxima, torch.stack(seen).amax(0))
    watch.reset()
    assert (watch.maxima == -math.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_tells_the_maximum(dtype: torch.dtype) -> None:
    q, k, v = drawn((2, 4, 2, 256, 64), dtype, "cuda")
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    y, largest = attend_with_flex(q, k, v)
    y.sum().backward()
    assert q.grad is not None
    expected = largest_logits(q.detach().float(), k.detach().float())
    torch.testing.assert_close(largest.detach().float(), expected, rtol=2e-2, atol=1e-2)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)
