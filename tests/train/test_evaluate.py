"""Evaluation sees the weights that are there now, and counts every token once."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from disttrain.testing import RankPool
from disttrain.testing.parity import global_batch
from disttrain.train.bigram import bigram_loss


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
def test_evaluate_load_evaluate_gives_the_loaded_weights(pool: RankPool, strategy: str) -> None:
    for before, after, expected in pool.run("tests.train.evaluate_jobs:evaluate_write_evaluate", 2, strategy=strategy):
        assert after == expected
        assert abs(before - after) > 1e-6


def test_bits_per_byte_divides_by_the_bytes_behind_the_labels(pool: RankPool) -> None:
    labels = global_batch(0)[1].numpy()
    valid = labels[labels >= 0]
    (loss, bits, tokens), *others = pool.run("tests.train.evaluate_jobs:bits_per_byte", 4)
    assert tokens == valid.size
    assert bits == pytest.approx(loss * valid.size / math.log(2) / valid.sum(), rel=1e-12)
    assert all(other == (loss, bits, tokens) for other in others)


def test_bigram_loss_against_a_table_of_counts() -> None:
    rng = np.random.default_rng(0)
    training, validation = rng.integers(0, 5, (4, 30)), rng.integers(0, 5, (2, 10))
    counts = np.zeros((5, 5))
    for window in training:
        for a, b in itertools.pairwise(window):
            counts[a, b] += 1
    loss, k = bigram_loss(list(training), list(validation), 5)
    table = (counts + k) / (counts.sum(1, keepdims=True) + 5 * k)
    naive = [-math.log(table[a, b]) for window in validation for a, b in itertools.pairwise(window)]
    assert loss == pytest.approx(np.mean(naive), rel=1e-12)
