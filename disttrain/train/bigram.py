"""What counting pairs of tokens would reach: the bar that a trained model has to pass."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

SMOOTHING = (0.01, 0.03, 0.1, 0.3, 1.0)


def bigram_loss(
    training: Iterable[np.ndarray], validation: Iterable[np.ndarray], vocab_size: int
) -> tuple[float, float]:
    """Nats per token of an add-k bigram model, and its k: the best of `SMOOTHING` on the validation windows themselves.

    Windows are token arrays [length + 1]. Choosing k where it is judged favours the bigram model.
    """
    pairs, pair_counts = np.unique(_pair_codes(training, vocab_size), return_counts=True)
    row_counts = np.zeros(vocab_size)
    np.add.at(row_counts, pairs // vocab_size, pair_counts)
    wanted = _pair_codes(validation, vocab_size)
    found = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    counts = np.where(pairs[found] == wanted, pair_counts[found], 0)
    rows = row_counts[wanted // vocab_size]
    losses = [(-np.log((counts + k) / (rows + k * vocab_size)).mean(), k) for k in SMOOTHING]
    loss, k = min(losses)
    return float(loss), k


def _pair_codes(windows: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """Each pair of neighbours as one number, previous * vocab_size + next."""
    codes = [window[:-1].astype(np.int64) * vocab_size + window[1:] for window in windows]
    return np.concatenate(codes)
