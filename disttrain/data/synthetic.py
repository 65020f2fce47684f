"""A made-up language: the same text from the same seed on every machine and version of Python."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

Item = TypeVar("Item")

WORDS = 400
SUCCESSORS = 6
TEXT_BYTES = 1_500_000
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"


def synthetic_text(seed: int) -> str:
    """About 1.5 MB of paragraphs, one a line: words that follow one another by a small Markov chain."""
    # Random.random() is the one method whose stream Python promises never to change.
    rng = Random(seed)
    words = [_word(rng) for _ in range(WORDS)]
    successors = [[_choose(rng, range(WORDS)) for _ in range(SUCCESSORS)] for _ in words]
    paragraphs, size, current = [], 0, 0
    while size < TEXT_BYTES:
        sentences = []
        for _ in range(3 + int(rng.random() * 5)):
            sentence = []
            for _ in range(4 + int(rng.random() * 10)):
                # The square favours the first successors: some words are likely, none is certain.
                current = successors[current][int(rng.random() ** 2 * SUCCESSORS)]
                sentence.append(words[current])
            sentences.append(" ".join(sentence).capitalize() + ".")
        paragraphs.append(" ".join(sentences) + "\n")
        size += len(paragraphs[-1])
    return "".join(paragraphs)


def _word(rng: Random) -> str:
    return "".join(_choose(rng, CONSONANTS) + _choose(rng, VOWELS) for _ in range(1 + int(rng.random() * 3)))


def _choose(rng: Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]
