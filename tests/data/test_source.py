from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from disttrain.data import source as source_module
from disttrain.data.source import Data, check_length, check_token_ids, open_data
from disttrain.errors import UserError

ROOT = Path(__file__).parents[2]
RACE = """
import sys
from pathlib import Path
from disttrain.data import cache
from disttrain.data.source import open_data

made = []
write = cache.write_atomic
cache.write_atomic = lambda path, data: (made.append(path.name), write(path, data))
data = open_data("synthetic", None, "bpe", 300, 0.1, Path(sys.argv[1]), 0)
print(data.tokenizer.sha256, int(data.train.tokens(0).sum()), len(made))
"""


def opened(cache: Path, path: Path | None = None, tokenizer: str = "bytes", vocab_size: int = 300) -> Data:
    return open_data("synthetic", None if path is None else str(path), tokenizer, vocab_size, 0.1, cache, 0)


def test_nothing_is_encoded_before_it_is_read(tmp_path: Path) -> None:
    data = opened(tmp_path)
    assert not (tmp_path / "shards").exists()
    check_length(data, 64)
    assert sorted(path.name.split("-")[1] for path in (tmp_path / "shards").glob("*.bin")) == ["train", "validation"]


def test_identity_is_json_and_repeatable(tmp_path: Path) -> None:
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert json.loads(json.dumps(one.identity)) == two.identity
    assert set(one.identity) == {"source", "version", "fingerprint", "tokenizer_sha256"}
    assert one.identity["source"] == "synthetic"


def test_missing_stdlib_falls_back_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "stdlib_corpus", lambda: None)
    data = open_data("stdlib", None, "bytes", 300, 0.1, tmp_path, 0)
    assert data.identity["source"] == "synthetic"
    assert "standard library are not installed" in data.notes[0]


def test_text_without_enough_pairs_is_noted(text_file: Path, tmp_path: Path) -> None:
    data = opened(tmp_path / "cache", text_file, "bpe", 5000)
    assert data.tokenizer is not None
    assert data.notes == [
        f"the training text is too short for 5000 tokens: the tokenizer has {data.tokenizer.vocab_size}"
    ]


def test_a_short_text_is_refused_with_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    data = opened(tmp_path / "cache", tmp_path / "a.txt")
    with pytest.raises(UserError) as caught:
        check_length(data, 16)
    assert "training set: 11 tokens in 1 shards" in caught.value.problems[0]
    assert "validation set: 0 tokens in 0 shards" in caught.value.problems[1]
    assert all("16 + 1 = 17 tokens" in problem for problem in caught.value.problems)


def test_bin_files_need_no_tokenizer_but_take_one(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    for path in (tmp_path / "a.bin", tmp_path):
        data = opened(tmp_path, path, "bpe", vocab_size=1000)
        assert data.tokenizer is None
        assert data.identity["tokenizer_sha256"] is None
        assert "no tokenizer" in data.notes[0]
        check_length(data, 99)
    with pytest.raises(UserError, match=r"validation set: 100 tokens .* 100 \+ 1 = 101 tokens"):
        check_length(data, 100)
    text = opened(tmp_path / "cache", None, "bpe", vocab_size=300)
    assert text.tokenizer is not None
    text.tokenizer.save(tmp_path / "tokenizer.json")
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "a.bin")
    data = opened(tmp_path, tmp_path / "a.bin", str(tmp_path / "tokenizer.json"), vocab_size=7)
    assert data.identity["tokenizer_sha256"] == text.tokenizer.sha256


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    data = opened(tmp_path, tmp_path / "a.bin")
    check_token_ids(data, 1000)
    with pytest.raises(UserError, match=r"holds token 999, but .* 512 - 1 = 511; set model.vocab_size to 1000"):
        check_token_ids(data, 512)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    for name, kinds in (("gone", r"\.txt or \.jsonl"), ("gone.bin", r"\.bin")):
        with pytest.raises(UserError, match=rf"{name}: no such file or folder; give the path of {kinds} files"):
            opened(tmp_path, tmp_path / name)


def test_processes_that_race_make_each_file_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    results = [process.communicate()[0].split() for process in processes]
    assert len({tuple(result[:2]) for result in results}) == 1
    # The corpus, the tokenizer and one shard.
    assert sum(int(result[2]) for result in results) == 3
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_the_package_imports_neither_torch_nor_tokenizers() -> None:
    code = "import sys, disttrain.data.source; print({'torch', 'tokenizers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "set()\n"
