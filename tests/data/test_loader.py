from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from disttrain.data.corpus import Corpus
from disttrain.data.loader import IGNORE_LABEL, BatchLoader, SampleOrder, validation_batches
from disttrain.data.token_shards import EncodedShards
from disttrain.data.tokenizer import Tokenizer
from disttrain.errors import UserError
from tests.data.conftest import ArrayShards, SizedShards

LENGTH = 10
WINDOWS = 49 + 0 + 39 + 29
"""Of the shards of `counted`, with 500, 5, 395 and 300 tokens."""


def test_every_epoch_takes_each_window_once(counted: ArrayShards) -> None:
    order = SampleOrder(counted, LENGTH, seed=0)
    epochs = [[order.locate(e * WINDOWS + i) for i in range(WINDOWS)] for e in range(3)]
    windows = [(0, w) for w in range(49)] + [(2, w) for w in range(39)] + [(3, w) for w in range(29)]
    assert all(sorted(epoch) == windows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order.locate(i) for i in range(WINDOWS)] == epochs[0]


def test_a_sample_is_the_window_it_says(counted: ArrayShards) -> None:
    order = SampleOrder(counted, LENGTH, seed=0)
    offsets = [0, 500, 505, 900]
    for position in range(WINDOWS):
        shard, window = order.locate(position)
        first = offsets[shard] + window * LENGTH
        assert order.window(position).dtype == np.int64
        assert order.window(position).tolist() == list(range(first, first + LENGTH + 1))


def test_a_sample_depends_on_seed_and_position_alone(counted: ArrayShards) -> None:
    walked = SampleOrder(counted, LENGTH, seed=5)
    samples = [walked.window(i) for i in range(3 * WINDOWS)]
    for position in (0, 1, WINDOWS - 1, WINDOWS, 3 * WINDOWS - 1):
        assert np.array_equal(SampleOrder(counted, LENGTH, seed=5).window(position), samples[position])
    other = SampleOrder(counted, LENGTH, seed=6)
    assert any(not np.array_equal(other.window(i), samples[i]) for i in range(5))


def global_batch(shards: ArrayShards, world: int, microbatch: int, position: int) -> np.ndarray:
    loaders = [BatchLoader(SampleOrder(shards, LENGTH, 0), microbatch, rank, world) for rank in range(world)]
    parts = [part for loader in loaders for part in loader.microbatches(position, 16)]
    assert len(parts) == 16 // microbatch
    assert all(part.tokens.shape == part.labels.shape == (microbatch, LENGTH) for part in parts)
    assert all(np.array_equal(part.tokens[:, 1:], part.labels[:, :-1]) for part in parts)
    return np.concatenate([np.concatenate([part.tokens, part.labels], axis=1) for part in parts])


@pytest.mark.parametrize("position", [0, 16, WINDOWS - 3, 16 * 1000])
def test_the_global_batch_is_the_same_for_every_layout(counted: ArrayShards, position: int) -> None:
    expected = global_batch(counted, world=1, microbatch=16, position=position)
    for world in (1, 2, 4):
        for microbatch in (1, 2, 4):
            assert np.array_equal(global_batch(counted, world, microbatch, position), expected)


def test_microbatches_are_as_equal_as_they_can_be(counted: ArrayShards) -> None:
    loader = BatchLoader(SampleOrder(counted, LENGTH, 0), 4, rank=0, world=2)
    assert [len(part.tokens) for part in loader.microbatches(0, 14)] == [4, 3]
    assert [len(part.tokens) for part in loader.microbatches(0, 18)] == [3, 3, 3]
    assert [len(part.tokens) for part in loader.microbatches(0, 2)] == [1]


def test_an_uneven_global_batch_is_refused_with_the_arithmetic(counted: ArrayShards) -> None:
    loader = BatchLoader(SampleOrder(counted, LENGTH, 0), 2, rank=0, world=4)
    with pytest.raises(UserError, match="30 samples: 4 ranks cannot share it; nearest: 32"):
        loader.microbatches(0, 30)


def test_only_reached_shards_are_encoded(corpus: Corpus, plain_bytes: Tokenizer, tmp_path: Path) -> None:
    shards = EncodedShards(corpus.train, plain_bytes, tmp_path, "train")
    loader = BatchLoader(SampleOrder(shards, 64, 0), 4, rank=0, world=2)
    assert not list(tmp_path.iterdir())
    loader.microbatches(0, 8)
    assert len(list(tmp_path.glob("*.bin"))) == 1
    loader.microbatches(20_000, 8)
    assert len(list(tmp_path.glob("*.bin"))) == 2


def test_a_trillion_tokens_cost_no_memory() -> None:
    shards = SizedShards(*[10**8] * 10_000)
    order = SampleOrder(shards, 1024, 0)
    tracemalloc.start()
    order.locate(0)
    assert len(shards.opened) == 1
    order.locate(10**12 // 1024 // 2)
    assert 4990 < len(shards.opened) < 5010
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_a_far_epoch_of_a_short_set_is_computed_and_not_walked(counted: ArrayShards) -> None:
    position = 10**12 + 7
    assert SampleOrder(counted, LENGTH, 0).locate(position) == SampleOrder(counted, LENGTH, 0).locate(position)


@pytest.mark.parametrize("sizes", [(), (0,), (9, 0, 10)])
def test_a_set_without_a_window_is_refused_with_the_numbers(sizes: tuple[int, ...]) -> None:
    shards = SizedShards(*sizes)
    problem = (
        rf"{sum(sizes)} tokens in {len(sizes)} shards, the longest {max(sizes, default=0)}, .* 10 \+ 1 = 11 tokens"
    )
    with pytest.raises(UserError, match="training set: " + problem):
        SampleOrder(shards, LENGTH, 0).window(0)
    with pytest.raises(UserError, match="validation set: " + problem):
        next(validation_batches(shards, LENGTH, 100, rank=0, world=1, rows=2))


@pytest.mark.parametrize(("world", "rows"), [(1, 4), (2, 4), (3, 2), (4, 8)])
def test_validation_counts_the_same_windows_for_every_layout(counted: ArrayShards, world: int, rows: int) -> None:
    ranks = [list(validation_batches(counted, LENGTH, 555, r, world, rows)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(part.tokens.shape == (rows, LENGTH) for batches in ranks for part in batches)
    labels = np.concatenate([part.labels.ravel() for batches in ranks for part in batches])
    # 55 windows: the 49 of the first shard, none of the second, and 6 of the third.
    expected = np.concatenate([np.arange(1, 491), np.arange(506, 566)])
    assert np.array_equal(np.sort(labels[labels != IGNORE_LABEL]), expected)


def test_validation_takes_at_least_one_window_and_opens_no_more_shards_than_it_needs() -> None:
    shards = SizedShards(100, 100)
    [batch] = validation_batches(shards, LENGTH, 1, rank=1, world=2, rows=3)
    assert (batch.labels == IGNORE_LABEL).all()
    assert shards.opened == {0}
