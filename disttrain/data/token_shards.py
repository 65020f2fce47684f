"""Shard sets: lists of token arrays that live in files and are mapped into memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from disttrain.data.cache import make_once
from disttrain.data.corpus import Piece, find_files, name_hash, read_texts
from disttrain.data.tokenizer import Tokenizer
from disttrain.errors import UserError

SHARD_TEXT_BYTES = 1 << 20
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
HEADER_KINDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Magic -> (version, type of a token): GPT-2 tokens and Llama 3 tokens, as llm.c and modded-nanogpt write them."""

_VALIDATION = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])")


class ShardSet(Protocol):
    """A list of token arrays."""

    def __len__(self) -> int: ...

    def tokens(self, index: int) -> np.ndarray:
        """The tokens of one shard, 1-D, uint16 or uint32, as a rule a memory map."""
        ...


class EncodedShards:
    """Text, dealt to shards of about 1 MiB, each encoded into the cache the first time it is asked for.

    A piece goes to the shard that the hash of its name gives, so that every shard is a mixture.
    `name` stands for the pieces in the names of the cache files: it must differ where they do.
    """

    def __init__(self, pieces: Sequence[Piece], tokenizer: Tokenizer, directory: Path, name: str) -> None:
        total_bytes = sum(piece.end - piece.start for piece in pieces)
        self._shards: list[list[Piece]] = [[] for _ in range(-(-total_bytes // SHARD_TEXT_BYTES))]
        for piece in pieces:
            self._shards[name_hash(piece.name) % len(self._shards)].append(piece)
        self._tokenizer = tokenizer
        self._stem = directory / f"{name}-{tokenizer.sha256[:16]}"
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

    def __len__(self) -> int:
        return len(self._shards)

    def tokens(self, index: int) -> np.ndarray:
        """The tokens of one shard, encoded now if no process on this file system has done so."""
        path = self._stem.with_name(f"{self._stem.name}-{index:06d}-of-{len(self):06d}.bin")
        return _map(make_once(path, lambda: self._encode(index)), self._dtype, 0)

    def _encode(self, index: int) -> bytes:
        texts = [text for piece in self._shards[index] for text in read_texts(piece)]
        eot = np.array([self._tokenizer.eot_id], dtype=np.uint32)
        parts = [part for ids in self._tokenizer.encode_batch(texts) for part in (eot, ids)]
        return b"".join(part.astype(self._dtype).tobytes() for part in parts)


class BinPart(NamedTuple):
    """The tokens from `start` up to `stop` of a .bin file."""

    path: Path
    start: int
    stop: int


class BinShards:
    """Parts of .bin files, each mapped when it is first asked for."""

    def __init__(self, parts: Sequence[BinPart]) -> None:
        self._parts = list(parts)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def __getstate__(self) -> dict[str, Any]:
        # A map that is pickled for another process would travel as a copy of the file.
        return {"_parts": self._parts, "_maps": {}}

    def tokens(self, index: int) -> np.ndarray:
        """The tokens of one shard."""
        if index not in self._maps:
            part = self._parts[index]
            self._maps[index] = open_bin(part.path)[part.start : part.stop]
        return self._maps[index]


def bin_shard_sets(path: Path, validation_fraction: float) -> tuple[BinShards, BinShards]:
    """(training, validation) of the .bin files at `path`, a file or a folder.

    Files with the word val in their name (val.bin, fineweb_val_000000.bin) are the validation set; without any, it is
    the last `validation_fraction` of the tokens of the last file. Raises `UserError`, see `open_bin`.
    """
    named = find_files(path, (".bin",))
    held_out = [file for _, file in named if _VALIDATION.search(file.name)] if len(named) > 1 else []
    train = [_whole(file) for _, file in named if file not in held_out]
    if not train:
        raise UserError(
            f"{path}: all of its {len(named)} .bin files have val in their name, which leaves none to train on; "
            "rename the training files"
        )
    if held_out:
        return BinShards(train), BinShards([_whole(file) for file in held_out])
    path, _, size = train.pop()
    cut = size - int(size * validation_fraction)
    return BinShards([*train, BinPart(path, 0, cut)]), BinShards([BinPart(path, cut, size)])


def _whole(path: Path) -> BinPart:
    return BinPart(path, 0, open_bin(path).size)


def open_bin(path: Path) -> np.ndarray:
    """Map a .bin file: raw uint16 (nanoGPT), or a header of 256 int32 and then tokens (llm.c, modded-nanogpt).

    Raises `UserError` when the version is unknown or the size does not fit the header or the type.
    """
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    # Raw GPT-2 tokens cannot look like a header: its low half, 56088, is beyond their 50257 ids.
    if header.size < 3 or int(header[0]) not in HEADER_KINDS:
        if size % 2:
            raise UserError(f"{path}: {size} bytes is odd, a uint16 token has 2; copy or write the file again")
        return _map(path, np.dtype("<u2"), 0)
    magic, version, count = (int(number) for number in header)
    known, dtype = HEADER_KINDS[magic][0], np.dtype(HEADER_KINDS[magic][1])
    if version != known:
        raise UserError(f"{path}: header version {version}, but only version {known} is known; write it as that one")
    expected = HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path}: {size} bytes, but its header says {HEADER_BYTES} + {count} tokens * {dtype.itemsize} bytes "
            f"= {expected}; copy or write the file again"
        )
    return _map(path, dtype, HEADER_BYTES)


def _map(path: Path, dtype: np.dtype, offset_bytes: int) -> np.ndarray:
    # A file of nothing cannot be mapped.
    if path.stat().st_size <= offset_bytes:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset_bytes)
