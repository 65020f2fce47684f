"""Damage to files, as disks, copies and people do it: pure functions on files. `damaged` puts a directory back."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PAGE_BYTES = 4096
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null')


@contextmanager
def damaged(directory: Path) -> Iterator[None]:
    """Afterwards the plain files of `directory` are what they were before, and nothing else is in it."""
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    try:
        yield
    finally:
        for path in list(directory.iterdir()):
            if not stat.S_ISREG(path.lstat().st_mode) or path.name not in before:
                remove(path)
        for name, content in before.items():
            path = directory / name
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


def remove(path: Path) -> None:
    """Whatever it is: a file, a link, a FIFO, or a directory with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def flip_bit(path: Path, bit: int) -> None:
    """Turn one bit over, counted from the start of the file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        value = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([value]))


def zero_page(path: Path, page: int) -> None:
    """Zero one 4 KiB page, as a lost write does; the last one may be shorter."""
    with path.open("r+b") as file:
        file.seek(page * PAGE_BYTES)
        length = len(file.read(PAGE_BYTES))
        file.seek(page * PAGE_BYTES)
        file.write(bytes(length))


def pages_with_data(path: Path) -> list[int]:
    """The pages that `zero_page` changes."""
    content = path.read_bytes()
    return [page for page in range(-(-len(content) // PAGE_BYTES)) if any(content[page * PAGE_BYTES :][:PAGE_BYTES])]


def truncate(path: Path, size: int) -> None:
    """Keep the first `size` bytes."""
    os.truncate(path, size)


def replace(path: Path, other: Path) -> None:
    """Put a copy of `other` in the place of a file."""
    shutil.copyfile(other, path)


def json_tokens(content: bytes, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Where each key and each value of JSON text begins and ends."""
    return [match.span() for match in _TOKEN.finditer(content, start, len(content) if end is None else end)]


def header_span(path: Path) -> tuple[int, int]:
    """Where the JSON header of a safetensors file begins and ends."""
    with path.open("rb") as file:
        return 8, 8 + int.from_bytes(file.read(8), "little")


def fields(path: Path) -> list[tuple[int, int]]:
    """Byte spans: each key and value of a manifest; of a data file, the bytes of the length, those of the header."""
    content = path.read_bytes()
    if path.name == MANIFEST:
        return json_tokens(content)
    start, end = header_span(path)
    return [(byte, byte + 1) for byte in range(start)] + json_tokens(content, start, end)


def covering_bits(directory: Path, rng: random.Random) -> list[tuple[Path, int]]:
    """One bit in every field of every file of a checkpoint, in a random order."""
    bits = [
        (path, rng.randrange(8 * start, 8 * end)) for path in sorted(directory.iterdir()) for start, end in fields(path)
    ]
    rng.shuffle(bits)
    return bits


def random_bit(directory: Path, rng: random.Random) -> tuple[Path, int]:
    """Any bit of any of its files, each file as likely as the others."""
    path = rng.choice(sorted(directory.iterdir()))
    return path, rng.randrange(8 * path.stat().st_size)


def resign(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest's content and sign it again, as somebody who means harm would."""
    content = json.loads((directory / MANIFEST).read_bytes())
    del content["sha256"]
    change(content)
    write_signed(directory, content)


def write_signed(directory: Path, content: dict[str, Any]) -> None:
    """Write a manifest of any content with the checksum that belongs to it."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    (directory / MANIFEST).write_text(f'{canonical[:-1]},"sha256":"{digest}"}}\n', encoding="utf-8")


def resign_file(path: Path) -> None:
    """Make the manifest beside a data file promise the size and checksum that the file has now."""

    def promise(content: dict[str, Any]) -> None:
        [entry] = [entry for entry in content["files"] if entry["name"] == path.name]
        found = path.read_bytes()
        entry.update(bytes=len(found), crc32=f"{zlib.crc32(found):08x}")

    resign(path.parent, promise)


def write_header(path: Path, text: bytes, length: int | None = None) -> None:
    """Give a safetensors file another header, true or with a false `length`, and keep its data."""
    data = path.read_bytes()[header_span(path)[1] :]
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file."""
    start, end = header_span(path)
    return json.loads(path.read_bytes()[start:end])
