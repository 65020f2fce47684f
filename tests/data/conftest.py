from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from disttrain.data.corpus import Corpus, synthetic_corpus
from disttrain.data.tokenizer import Tokenizer


class ArrayShards:
    """A shard set of arrays in memory."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def tokens(self, index: int) -> np.ndarray:
        return self.arrays[index]


class SizedShards:
    """A shard set of nothing but sizes: one stored zero stands for all tokens. Counts what is opened."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.opened: set[int] = set()

    def __len__(self) -> int:
        return len(self.sizes)

    def tokens(self, index: int) -> np.ndarray:
        self.opened.add(index)
        return np.broadcast_to(np.uint16(0), (self.sizes[index],))


@pytest.fixture
def counted() -> ArrayShards:
    """Four shards, 0 to 1199 in all: the token is its place, so a window tells where it came from."""
    tokens = np.arange(1200, dtype=np.uint16)
    return ArrayShards([tokens[:500], tokens[500:505], tokens[505:900], tokens[900:]])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return synthetic_corpus(0, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def plain_bytes() -> Tokenizer:
    return Tokenizer.train_bpe([], 257)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a short text\n" for i in range(4000)))
    return path
