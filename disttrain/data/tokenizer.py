"""Tokenizers: byte-level BPE trained on the corpus, plain bytes, or any tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from disttrain.data.cache import make_once, write_atomic
from disttrain.data.corpus import Corpus, hash_order, read_texts
from disttrain.errors import UserError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
BYTES_VOCAB_SIZE = 257
"""One entry for each byte and one for the end of a text."""
TRAINING_BYTES = 3_000_000


class Tokenizer:
    """A Hugging Face tokenizer that encodes text as nothing but text: no special tokens, padding or truncation."""

    def __init__(self, definition: bytes) -> None:
        """`definition` is the content of a tokenizer.json; raises whatever the library raises if it is not."""
        from tokenizers import Tokenizer as Backend

        self._definition = definition
        self._backend = Backend.from_str(definition.decode("utf-8"))
        self._backend.no_padding()
        self._backend.no_truncation()
        # A document that spells a special token must not end itself.
        self._backend.encode_special_tokens = True
        self._vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with `<|endoftext|>` as id 0 and every byte; 257 entries leave no merges, plain bytes.

        The vocabulary is smaller than `vocab_size` when the texts run out of pairs to merge.
        Raises `UserError` when `vocab_size` has no room for the bytes.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < BYTES_VOCAB_SIZE:
            raise UserError(
                f"vocab_size {vocab_size}: byte-level BPE needs 256 bytes + 1 special token = {BYTES_VOCAB_SIZE} "
                f"entries; set it to {BYTES_VOCAB_SIZE} or more"
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend.to_str().encode())

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json; raises `UserError` when it is missing, broken or has no end-of-text token."""
        try:
            tokenizer = cls(path.read_bytes())
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"tokenizer {path}: not a readable tokenizer.json ({error}); "
                "give bpe, bytes or the path of a file saved by the tokenizers library"
            ) from error
        if not any(name in tokenizer._vocab for name in END_OF_TEXT_NAMES):
            raise UserError(
                f"tokenizer {path}: its {tokenizer.vocab_size} entries have no end-of-text token; "
                f"add one of {', '.join(END_OF_TEXT_NAMES)}"
            )
        return tokenizer

    def save(self, path: Path) -> None:
        """Write the tokenizer.json it was made from, byte for byte."""
        write_atomic(path, self._definition)

    @cached_property
    def sha256(self) -> str:
        """Of the tokenizer.json, as `sha256sum` prints it."""
        return hashlib.sha256(self._definition).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._vocab.values()) + 1

    @cached_property
    def eot_id(self) -> int:
        """The id that goes before every document."""
        return next(self._vocab[name] for name in END_OF_TEXT_NAMES if name in self._vocab)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array of ids for each text."""
        # A command line may carry bytes that are no text; the tokenizer takes nothing but text.
        plain = [text.encode("utf-8", "replace").decode() for text in texts]
        encodings = self._backend.encode_batch_fast(plain, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def bytes_per_token(self) -> np.ndarray | None:
        """int64 [vocab_size], the bytes of text behind each id, 0 for special tokens; None if not byte-level."""
        if (json.loads(self._definition).get("decoder") or {}).get("type") != "ByteLevel":
            return None
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self._vocab.items():
            # The byte alphabet writes every byte as one character.
            sizes[i] = len(token)
        for i, added in self._backend.get_added_tokens_decoder().items():
            sizes[i] = 0 if added.special else len(added.content.encode())
        return sizes


def build_tokenizer(corpus: Corpus, kind: str, vocab_size: int, cache_directory: Path) -> Tokenizer:
    """The tokenizer `kind` names: "bpe" (trained on the corpus once, then cached), "bytes", or a tokenizer.json.

    `vocab_size` is for "bpe" alone. Raises `UserError`, see `Tokenizer.load` and `Tokenizer.train_bpe`.
    """
    if kind == "bytes":
        return Tokenizer.train_bpe([], BYTES_VOCAB_SIZE)
    if kind != "bpe":
        return Tokenizer.load(Path(kind))

    def train() -> bytes:
        return Tokenizer.train_bpe(_training_texts(corpus), vocab_size)._definition

    return Tokenizer.load(make_once(cache_directory / f"bpe-{corpus.fingerprint[:16]}-{vocab_size}.json", train))


def _training_texts(corpus: Corpus) -> Iterator[str]:
    """At most 3 MB of training text, in an order that mixes the files."""
    left = TRAINING_BYTES
    for piece in hash_order(corpus.train):
        for text in read_texts(piece):
            if left <= 0:
                return
            yield text[:left]
            left -= len(text.encode())
