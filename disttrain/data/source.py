"""From the settings of a run to its data: which files, which tokenizer, which shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from disttrain.data.corpus import Corpus, file_corpus, find_files, fingerprint, stdlib_corpus, synthetic_corpus
from disttrain.data.loader import has_window, too_short
from disttrain.data.token_shards import BinShards, EncodedShards, ShardSet, bin_shard_sets
from disttrain.data.tokenizer import Tokenizer, build_tokenizer
from disttrain.errors import UserError

CHECKED_TOKENS = 1 << 16


@dataclass(frozen=True)
class Data:
    """What a run reads; `identity` is JSON and equal for equal data, `notes` are sentences for the user."""

    train: ShardSet
    validation: ShardSet
    tokenizer: Tokenizer | None
    identity: dict[str, Any]
    notes: list[str]

    @property
    def bytes_per_token(self) -> np.ndarray | None:
        """int64 [vocab]: the bytes of text behind each token, where that is known."""
        return self.tokenizer.bytes_per_token if self.tokenizer is not None else None


def open_data(
    source: Literal["stdlib", "synthetic"],
    path: str | None,
    tokenizer: str,
    vocab_size: int,
    validation_fraction: float,
    cache_directory: Path,
    seed: int,
) -> Data:
    """Open the files at `path`, or else the named `source`, without encoding any of it.

    A .bin file, or a folder that holds one, is tokens; anything else is text. `tokenizer` is "bpe",
    "bytes" or the path of a tokenizer.json; with .bin data only a path gives a tokenizer, to decode with.
    Raises `UserError` when the data or the tokenizer cannot be used.
    """
    if path is not None and _is_bin(Path(path)):
        return _open_bin(Path(path), tokenizer, validation_fraction)
    notes: list[str] = []
    corpus = _open_corpus(source, path, validation_fraction, cache_directory, seed, notes)
    built = build_tokenizer(corpus, tokenizer, vocab_size, cache_directory / "tokenizers")
    if tokenizer == "bpe" and built.vocab_size < vocab_size:
        notes.append(f"the training text is too short for {vocab_size} tokens: the tokenizer has {built.vocab_size}")
    shards, key = cache_directory / "shards", corpus.fingerprint[:16]
    return Data(
        train=EncodedShards(corpus.train, built, shards, f"{key}-train"),
        validation=EncodedShards(corpus.validation, built, shards, f"{key}-validation"),
        tokenizer=built,
        identity=_identity(corpus.name, corpus.version, corpus.fingerprint, built),
        notes=notes,
    )


def check_length(data: Data, sequence_length: int) -> None:
    """Raises `UserError` when the training or the validation set has not one window.

    Opens, and for text encodes, shards up to the first with a window.
    """
    sets = (("training set", data.train), ("validation set", data.validation))
    problems = [
        too_short(name, shards, sequence_length) for name, shards in sets if not has_window(shards, sequence_length)
    ]
    if problems:
        raise UserError(problems)


def check_token_ids(data: Data, vocab_size: int) -> None:
    """A look at the head of every token file: ids beyond the vocabulary would fail much later and unreadably."""
    if not isinstance(data.train, BinShards):
        return
    files = [shards.tokens(i) for shards in (data.train, data.validation) for i in range(len(shards))]
    largest = max(int(tokens[:CHECKED_TOKENS].max(initial=0)) for tokens in files)
    if largest >= vocab_size:
        raise UserError(
            f"{data.identity['source']}: holds token {largest}, but the vocabulary ends at {vocab_size} - 1 = "
            f"{vocab_size - 1}; set model.vocab_size to {largest + 1} or more"
        )


def _is_bin(path: Path) -> bool:
    return path.suffix == ".bin" if not path.is_dir() else next(path.rglob("*.bin"), None) is not None


def _open_corpus(
    source: str, path: str | None, validation_fraction: float, cache_directory: Path, seed: int, notes: list[str]
) -> Corpus:
    if path is not None:
        return file_corpus(Path(path), validation_fraction)
    if source == "stdlib":
        corpus = stdlib_corpus()
        if corpus is not None:
            return corpus
        notes.append("the sources of Python's standard library are not installed: training on synthetic text")
    return synthetic_corpus(seed, cache_directory / "corpora")


def _open_bin(path: Path, tokenizer: str, validation_fraction: float) -> Data:
    train, validation = bin_shard_sets(path, validation_fraction)
    loaded = None if tokenizer in ("bpe", "bytes") else Tokenizer.load(Path(tokenizer))
    key = fingerprint(find_files(path, (".bin",)), validation_fraction)
    notes = [] if loaded else [f"{path} holds tokens: no tokenizer is used, and samples cannot be decoded"]
    version = f"{sum(train.tokens(i).size for i in range(len(train)))} training tokens"
    return Data(train, validation, loaded, _identity(path.name, version, key, loaded), notes)


def _identity(name: str, version: str, key: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    sha256 = tokenizer.sha256 if tokenizer else None
    return {"source": name, "version": version, "fingerprint": key, "tokenizer_sha256": sha256}
