from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from disttrain.data.corpus import Corpus, read_texts
from disttrain.data.tokenizer import Tokenizer, build_tokenizer
from disttrain.errors import UserError

TEXTS = ["Hello, world! It's 1 text.\n\n  indented", "Grüße, 世界 \U0001f600\r\n\t", "", " <|endoftext|>"]


@pytest.fixture(scope="module")
def bpe(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer(corpus, "bpe", 512, tmp_path_factory.mktemp("tokenizers"))


def test_every_text_round_trips(bpe: Tokenizer, plain_bytes: Tokenizer) -> None:
    for tokenizer in (bpe, plain_bytes):
        for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
            assert ids.dtype == np.uint32
            assert tokenizer.decode(ids) == text


def test_bytes_per_token_sum_to_the_length(bpe: Tokenizer, plain_bytes: Tokenizer, corpus: Corpus) -> None:
    texts = [*TEXTS, *read_texts(corpus.validation[0])]
    for tokenizer in (bpe, plain_bytes):
        sizes = tokenizer.bytes_per_token
        assert sizes is not None
        assert sizes.shape == (tokenizer.vocab_size,)
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert sizes[ids].sum() == len(text.encode())


def test_a_spelled_special_token_is_text(bpe: Tokenizer) -> None:
    [ids] = bpe.encode_batch(["a<|endoftext|>b"])
    assert bpe.eot_id == 0
    assert bpe.eot_id not in ids
    assert bpe.decode([0]) == "<|endoftext|>"
    assert bpe.bytes_per_token is not None
    assert bpe.bytes_per_token[0] == 0


def test_257_entries_are_bytes(plain_bytes: Tokenizer, bpe: Tokenizer) -> None:
    text = "any text ä"
    assert plain_bytes.vocab_size == 257
    assert len(plain_bytes.encode_batch([text])[0]) == len(text.encode())
    assert bpe.vocab_size == 512
    with pytest.raises(UserError, match=r"vocab_size 256: .* 256 bytes \+ 1 special token = 257"):
        Tokenizer.train_bpe([], 256)


def test_training_is_deterministic_and_saving_keeps_every_byte(bpe: Tokenizer, corpus: Corpus, tmp_path: Path) -> None:
    again = build_tokenizer(corpus, "bpe", 512, tmp_path)
    assert again.sha256 == bpe.sha256
    bpe.save(tmp_path / "saved.json")
    loaded = build_tokenizer(corpus, str(tmp_path / "saved.json"), 7, tmp_path)
    assert loaded.sha256 == bpe.sha256 == hashlib.sha256((tmp_path / "saved.json").read_bytes()).hexdigest()


def test_a_tokenizer_that_is_not_byte_level_loads(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"<eos>": 0, "<unk>": 1, "hello": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_padding(length=10)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "words.json"))
    tokenizer = Tokenizer.load(tmp_path / "words.json")
    assert tokenizer.encode_batch(["hello hello you"])[0].tolist() == [2, 2, 1]
    assert tokenizer.eot_id == 0
    assert tokenizer.bytes_per_token is None


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    (tmp_path / "broken.json").write_text('{"version": ')
    for name in ("broken.json", "missing.json"):
        with pytest.raises(UserError, match=f"{name}: not a readable tokenizer.json .*give bpe, bytes or"):
            Tokenizer.load(tmp_path / name)
    Backend(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "endless.json"))
    with pytest.raises(UserError, match="its 1 entries have no end-of-text token; add one of"):
        Tokenizer.load(tmp_path / "endless.json")
