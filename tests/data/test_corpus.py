from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from disttrain.data import corpus as corpus_module
from disttrain.data.corpus import Corpus, Piece, file_corpus, read_texts, stdlib_corpus, synthetic_corpus
from disttrain.data.synthetic import synthetic_text
from disttrain.errors import UserError


def whole_text(corpus: Corpus) -> str:
    pieces = sorted(corpus.train + corpus.validation, key=lambda piece: (piece.path, piece.start))
    return "".join(text for piece in pieces for text in read_texts(piece))


def test_pieces_cover_the_file_and_end_with_a_line(text_file: Path) -> None:
    corpus = file_corpus(text_file, 0.1)
    assert whole_text(corpus) == text_file.read_text()
    assert all(read_texts(piece)[0].endswith("\n") for piece in corpus.train + corpus.validation)
    assert len(corpus.train) > len(corpus.validation) > 0
    assert all(piece.end - piece.start < 2 * 4096 for piece in corpus.train)


def test_neither_side_is_empty_with_two_pieces(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text\n")
    for fraction in (0.0001, 0.9999):
        corpus = file_corpus(tmp_path, fraction)
        assert (len(corpus.train), len(corpus.validation)) == (1, 1)


def test_fingerprint_follows_content_and_split_but_not_place(tmp_path: Path) -> None:
    for folder, text in (("one", "text\n"), ("two", "text\n"), ("three", "TEXT\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text * 100)
    one, two, three = (file_corpus(tmp_path / name, 0.1).fingerprint for name in ("one", "two", "three"))
    assert one == two != three
    assert file_corpus(tmp_path / "one", 0.2).fingerprint != one


def test_jsonl_gives_one_text_per_line(tmp_path: Path) -> None:
    texts = ["first\nstill first", "zweite \u2028 Zeile", "\U0001f600"]
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + '\n\n{"text": "\\ud800x"}\n')
    [piece] = file_corpus(tmp_path, 0.1).train
    assert piece.name == "sub/a.jsonl:0"
    assert read_texts(piece) == [*texts, "?x"]


@pytest.mark.parametrize("line", ["not json", '{"body": "x"}', "[1]", '{"text": 3}', "7"])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl: the line at byte 17 "):
        read_texts(Piece("a", path, 0, path.stat().st_size))


def test_bad_paths_are_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: no such file or folder; give .* \.txt or \.jsonl"):
        file_corpus(tmp_path / "gone", 0.1)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match=r"none of its 1 files ends in \.txt or \.jsonl"):
        file_corpus(tmp_path, 0.1)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="1 files with 0 bytes in all"):
        file_corpus(tmp_path, 0.1)
    with pytest.raises(UserError, match=r"b\.txt: cannot be read"):
        read_texts(Piece("b", tmp_path / "b.txt", 0, 1))


def test_invalid_utf8_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xffcd\r\n")
    assert read_texts(Piece("a", tmp_path / "a.txt", 0, 7)) == ["ab\ufffdcd\r\n"]


def test_stdlib_is_split_by_file_name() -> None:
    corpus = stdlib_corpus()
    if corpus is None:
        pytest.skip("no sources of the standard library here")
    names = {piece.name for piece in corpus.train + corpus.validation}
    assert {"ast.py", "json/decoder.py"} <= names
    assert not any("test" in name.split("/") or "site-packages" in name for name in names)
    assert 0.05 < len(corpus.validation) / len(names) < 0.2
    assert corpus == stdlib_corpus()


def test_stdlib_without_sources_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "os.py").write_text("import sys\n")
    monkeypatch.setattr(corpus_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert stdlib_corpus() is None


def test_synthetic_text_never_changes(corpus: Corpus, tmp_path: Path) -> None:
    text = synthetic_text(0)
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN
    assert whole_text(corpus) == text
    assert synthetic_corpus(0, tmp_path).fingerprint == corpus.fingerprint
    assert synthetic_corpus(1, tmp_path).fingerprint != corpus.fingerprint


GOLDEN = "f69693294978ccc29ccd22abf20d43e6e95010a36bfe45f708f81e53c5e3ebde"
