from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from disttrain.data.corpus import Corpus, Piece, read_texts
from disttrain.data.token_shards import EncodedShards, bin_shard_sets, open_bin
from disttrain.data.tokenizer import Tokenizer
from disttrain.errors import UserError

TOKENS = np.arange(1000, dtype=np.uint16)


def headed(magic: int = 20240520, version: int = 1, count: int = 1000) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes()


def test_shards_hold_every_document_once(corpus: Corpus, plain_bytes: Tokenizer, tmp_path: Path) -> None:
    shards = EncodedShards(corpus.train, plain_bytes, tmp_path / "cache", "train")
    assert len(shards) == 2
    assert not (tmp_path / "cache").exists()
    documents = [
        document for i in range(2) for document in plain_bytes.decode(shards.tokens(i)).split("<|endoftext|>")[1:]
    ]
    assert sorted(documents) == sorted(text for piece in corpus.train for text in read_texts(piece))
    assert shards.tokens(0).dtype == np.uint16
    assert isinstance(shards.tokens(0), np.memmap)


def test_a_shard_is_encoded_when_asked_for(corpus: Corpus, plain_bytes: Tokenizer, tmp_path: Path) -> None:
    shards = EncodedShards(corpus.train, plain_bytes, tmp_path, "train")
    shards.tokens(1)
    [path] = tmp_path.glob("*.bin")
    assert path.name == f"train-{plain_bytes.sha256[:16]}-000001-of-000002.bin"
    before = path.stat().st_mtime_ns
    EncodedShards(corpus.train, plain_bytes, tmp_path, "train").tokens(1)
    assert path.stat().st_mtime_ns == before


def test_every_document_begins_with_the_special_token_and_has_no_other(plain_bytes: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one <|endoftext|> text"}\n{"text": ""}\n{"text": "two"}\n')
    piece = Piece("a", path, 0, path.stat().st_size)
    tokens = EncodedShards([piece], plain_bytes, tmp_path, "a").tokens(0)
    assert np.flatnonzero(tokens == plain_bytes.eot_id).tolist() == [0, 23, 24]


def test_a_shard_may_be_empty(plain_bytes: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n")
    assert EncodedShards([Piece("a", path, 0, 1)], plain_bytes, tmp_path, "a").tokens(0).size == 0
    assert len(EncodedShards([], plain_bytes, tmp_path, "none")) == 0


def test_an_unwritable_cache_is_named(corpus: Corpus, plain_bytes: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shards = EncodedShards(corpus.train, plain_bytes, tmp_path / "file", "train")
    with pytest.raises(UserError, match=r"cache file .*: cannot be written .*choose another cache directory"):
        shards.tokens(0)


@pytest.mark.parametrize(
    ("header", "dtype"),
    [(b"", "<u2"), (headed(), "<u2"), (headed(20240801, 7), "<u4")],
    ids=["nanogpt", "modded-nanogpt", "llama3"],
)
def test_bin_files_are_told_apart(tmp_path: Path, header: bytes, dtype: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(header + TOKENS.astype(dtype).tobytes())
    tokens = open_bin(path)
    assert tokens.dtype == np.dtype(dtype)
    assert np.array_equal(tokens, TOKENS)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (headed(version=2) + TOKENS.tobytes(), "header version 2, but only version 1 is known"),
        (headed(count=1001) + TOKENS.tobytes(), r"3024 bytes, .* 1024 \+ 1001 tokens \* 2 bytes = 3026"),
        (headed()[:100], r"100 bytes, .* 1024 \+ 1000 tokens \* 2 bytes = 3024"),
        (TOKENS.tobytes() + b"x", "2001 bytes is odd"),
    ],
)
def test_broken_bin_files_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        open_bin(tmp_path / "a.bin")


def test_validation_files_go_by_name(tmp_path: Path) -> None:
    for name, part in (("train_0", TOKENS[:300]), ("train_1", TOKENS[300:700]), ("val_0", TOKENS[700:])):
        part.tofile(tmp_path / f"{name}.bin")
    train, validation = bin_shard_sets(tmp_path, 0.1)
    assert [train.tokens(i).size for i in range(len(train))] == [300, 400]
    assert np.array_equal(validation.tokens(0), TOKENS[700:])


def test_without_validation_files_the_end_is_held_out(tmp_path: Path) -> None:
    TOKENS.tofile(tmp_path / "a.bin")
    TOKENS.tofile(tmp_path / "b.bin")
    for path, count in ((tmp_path / "a.bin", 1), (tmp_path, 2)):
        train, validation = bin_shard_sets(path, 0.1)
        assert (len(train), len(validation)) == (count, 1)
        assert np.array_equal(train.tokens(count - 1), TOKENS[:900])
        assert np.array_equal(validation.tokens(0), TOKENS[900:])


def test_only_validation_files_are_refused(tmp_path: Path) -> None:
    for name in ("val_0.bin", "val_1.bin"):
        TOKENS.tofile(tmp_path / name)
    with pytest.raises(UserError, match=r"all of its 2 \.bin files have val in their name"):
        bin_shard_sets(tmp_path, 0.1)


def test_mapped_files_travel_to_another_process_as_names(tmp_path: Path) -> None:
    np.arange(50_000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    train, _ = bin_shard_sets(tmp_path / "a.bin", 0.1)
    assert train.tokens(0).size == 45_000
    sent = pickle.dumps(train)
    assert len(sent) < 1_000
    assert np.array_equal(pickle.loads(sent).tokens(0), train.tokens(0))
