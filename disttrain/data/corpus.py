"""Sources of text, as byte ranges of files that are split between training and validation."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from disttrain.data.cache import make_once
from disttrain.data.synthetic import synthetic_text
from disttrain.errors import UserError

TEXT_SUFFIXES = (".txt", ".jsonl")
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
STDLIB_MIN_FILES = 100
STDLIB_MIN_BYTES = 2_000_000
VALIDATION_FRACTION = 0.1
MAX_PIECE_BYTES = 1 << 20
MIN_PIECE_BYTES = 4 << 10
FINGERPRINT_BYTES = 64 << 10


@dataclass(frozen=True)
class Piece:
    """The bytes [start, end) of a file; `name` is the same on every machine."""

    name: str
    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Corpus:
    """Pieces of text; equal fingerprints mean the same files and the same split."""

    name: str
    version: str
    train: tuple[Piece, ...]
    validation: tuple[Piece, ...]
    fingerprint: str


def read_texts(piece: Piece) -> list[str]:
    """The documents of a piece: the "text" of every line of a .jsonl file, and otherwise one text.

    Raises `UserError` for a file that cannot be read and for a line without a "text".
    """
    try:
        with piece.path.open("rb") as file:
            file.seek(piece.start)
            data = file.read(piece.end - piece.start)
    except OSError as error:
        raise UserError(f"{piece.path}: cannot be read ({error.strerror}); restore it or change the path") from error
    if piece.path.suffix != ".jsonl":
        return [data.decode("utf-8", errors="replace")]
    texts, offset = [], piece.start
    for line in data.split(b"\n"):
        if line.strip():
            texts.append(_json_text(line, piece.path, offset))
        offset += len(line) + 1
    return texts


def _json_text(line: bytes, path: Path, offset: int) -> str:
    try:
        text = json.loads(line.decode("utf-8", errors="replace"))["text"]
        # A lone surrogate (an escape such as \ud800) is not text: it has no UTF-8 form.
        return text.encode("utf-8", errors="replace").decode("utf-8")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path}: the line at byte {offset} is not a JSON object with a string "text"; '
            f"see it with: tail -c +{offset + 1} {path} | head -n 1"
        ) from error


def stdlib_corpus() -> Corpus | None:
    """The sources of Python's own standard library, or None where they are not installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    named = _named(files, root)
    pieces = [piece for name, path in named if (piece := Piece(name, path, 0, path.stat().st_size)).end > 0]
    if len(pieces) < STDLIB_MIN_FILES or sum(piece.end for piece in pieces) < STDLIB_MIN_BYTES:
        return None
    train, validation = _split(pieces, VALIDATION_FRACTION)
    return Corpus("stdlib", platform.python_version(), train, validation, fingerprint(named, VALIDATION_FRACTION))


def synthetic_corpus(seed: int, directory: Path) -> Corpus:
    """A made-up language with structure to learn, 1.5 MB, written once beneath `directory`."""
    path = make_once(directory / f"synthetic-{seed}.txt", lambda: synthetic_text(seed).encode())
    return _text_corpus("synthetic", f"seed {seed}", [(path.name, path)], VALIDATION_FRACTION)


def file_corpus(path: Path, validation_fraction: float) -> Corpus:
    """The .txt and .jsonl files at `path`, a file or a folder, cut at line ends into pieces.

    Raises `UserError` when there is nothing there, nothing of that kind, or no text in it.
    """
    named = find_files(path, TEXT_SUFFIXES)
    total_bytes = sum(file.stat().st_size for _, file in named)
    if total_bytes == 0:
        raise UserError(f"{path}: {len(named)} files with 0 bytes in all; give a path to files that hold text")
    return _text_corpus(path.name, f"{len(named)} files, {total_bytes} bytes", named, validation_fraction)


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """The files at `path` with one of `suffixes`, as (name relative to it, path), sorted by name.

    Raises `UserError` when the path is missing, no file there matches, or one may not be read.
    """
    wanted = " or ".join(suffixes)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give the path of {wanted} files")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    found = [file for file in files if file.suffix in suffixes]
    if not found:
        raise UserError(f"{path}: none of its {len(files)} files ends in {wanted}; convert or rename the data")
    if closed := [file for file in found if not os.access(file, os.R_OK)]:
        raise UserError(f"{closed[0]}: no permission to read it ({len(closed)} such files); allow it with chmod a+r")
    return _named(found, path.parent if path.is_file() else path)


def fingerprint(named: Iterable[tuple[str, Path]], *parameters: float) -> str:
    """sha256 over the parameters and, of each file, its name, its size and its first and last 64 KiB."""
    digest = hashlib.sha256(json.dumps(parameters).encode())
    for name, path in named:
        size = path.stat().st_size
        digest.update(json.dumps([name, size]).encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def hash_order(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces in an order that mixes them and that the other pieces do not influence."""
    return sorted(pieces, key=lambda piece: (name_hash(piece.name), piece.name))


def name_hash(name: str) -> int:
    """64 bits of the sha256 of a name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()[:8], "big")


def _text_corpus(name: str, version: str, named: list[tuple[str, Path]], validation_fraction: float) -> Corpus:
    total_bytes = sum(path.stat().st_size for _, path in named)
    piece_bytes = max(MIN_PIECE_BYTES, min(MAX_PIECE_BYTES, total_bytes // 50))
    pieces = [
        Piece(f"{relative}:{start}", path, start, end)
        for relative, path in named
        for start, end in _line_ranges(path, piece_bytes)
    ]
    train, validation = _split(pieces, validation_fraction)
    return Corpus(name, version, train, validation, fingerprint(named, piece_bytes, validation_fraction))


def _line_ranges(path: Path, piece_bytes: int) -> list[tuple[int, int]]:
    """Ranges that cover a file, each about `piece_bytes` long and ending with a line, where lines are not too long."""
    size, start, ranges = path.stat().st_size, 0, []
    with path.open("rb") as file:
        while start < size:
            end = _range_end(file, min(start + piece_bytes, size), size, -1 if path.suffix == ".jsonl" else piece_bytes)
            ranges.append((start, end))
            start = end
    return ranges


def _range_end(file: BinaryIO, end: int, size: int, longest_rest: int) -> int:
    """Where the line that byte `end` - 1 is in ends, or `end` if that is further off than `longest_rest` bytes."""
    file.seek(end - 1)
    if file.readline(longest_rest).endswith(b"\n") or file.tell() == size:
        return file.tell()
    # A file without lines (text8): the next byte that begins a character will do.
    file.seek(end)
    return end + next((i for i, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0)


def _split(pieces: list[Piece], validation_fraction: float) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """(training, validation) by the hash of the names, in the given order; two pieces leave neither empty."""
    ranked = hash_order(pieces)
    count = sum(name_hash(piece.name) < validation_fraction * 2**64 for piece in ranked)
    count = min(max(count, 1), len(ranked) - 1)
    held_out = set(ranked[:count])
    return tuple(piece for piece in pieces if piece not in held_out), tuple(p for p in pieces if p in held_out)


def _named(files: list[Path], root: Path) -> list[tuple[str, Path]]:
    return sorted((file.relative_to(root).as_posix(), file) for file in files)
