"""Checkpoints as somebody makes them who means harm: signed and with true checksums, but not what a save writes.

Each maker of `HOSTILE` changes a sound checkpoint's directory. `scratch` is an empty folder: a file named `ran` in it
afterwards says that content was executed.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disttrain.testing.faults import MANIFEST, read_header, resign, resign_file, write_header

Content = dict[str, Any]
Maker = Callable[[Path, Path], None]
MARKER = "ran"
BOMB_BYTES = 200 * 2**20
ROOMY_BYTES = 2**16
"""More than the tensors of a file need: less would be refused for that alone."""


class Trap:
    """Unpickling makes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.marker,)


def _shard(directory: Path) -> Path:
    return min(directory.glob("*.safetensors"))


def _tensor(content: Content) -> Content:
    """A tensor cut into several regions."""
    return max(content["tensors"].values(), key=lambda tensor: len(tensor["chunks"]))


def _signed(change: Callable[[Content], Any]) -> Maker:
    return lambda directory, scratch: resign(directory, change)


def _moved(directory: Path, scratch: Path, name: str) -> None:
    """Move a data file to `scratch` and let the manifest name it there; a reader that follows finds it."""
    shard = _shard(directory)
    shutil.move(shard, scratch / "evil.safetensors")

    def rename(content: Content) -> None:
        for place in (*content["files"], *(c for t in content["tensors"].values() for c in t["chunks"])):
            for key in ("name", "file"):
                if place.get(key) == shard.name:
                    place[key] = name

    resign(directory, rename)


def _traversal(directory: Path, scratch: Path) -> None:
    _moved(directory, scratch, f"{os.path.relpath(scratch, directory)}/evil.safetensors")


def _absolute(directory: Path, scratch: Path) -> None:
    _moved(directory, scratch, str(scratch / "evil.safetensors"))


def _metadata(directory: Path, scratch: Path) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(Trap(scratch / MARKER)))
    resign(directory, lambda content: content["files"].append({"name": ".metadata", "bytes": 1, "crc32": "0" * 8}))


def _pickle(directory: Path, scratch: Path) -> None:
    _shard(directory).write_bytes(pickle.dumps([Trap(scratch / MARKER), bytes(ROOMY_BYTES)]))
    resign_file(_shard(directory))


def _zip_of_pickle(directory: Path, scratch: Path) -> None:
    with zipfile.ZipFile(_shard(directory), "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([Trap(scratch / MARKER), bytes(ROOMY_BYTES)]))
    resign_file(_shard(directory))


def _zip_bomb(directory: Path, scratch: Path) -> None:
    with zipfile.ZipFile(_shard(directory), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(BOMB_BYTES))
    resign_file(_shard(directory))


def _huge_shape(content: Content) -> None:
    tensor = next(t for t in content["tensors"].values() if len(t["chunks"]) == 1 and t["shape"])
    tensor["shape"][0] = tensor["chunks"][0]["sizes"][0] = 10**18


def _twice_in_manifest(directory: Path, scratch: Path) -> None:
    path = directory / MANIFEST
    path.write_text(path.read_text().replace("{", '{"step":10,', 1))


def _twice_in_header(directory: Path, scratch: Path) -> None:
    text = json.dumps(read_header(_shard(directory))).replace("{", '{"__metadata__":{},', 1)
    write_header(_shard(directory), text.encode())
    resign_file(_shard(directory))


def _header(change: Callable[[Content], Any]) -> Maker:
    def make(directory: Path, scratch: Path) -> None:
        header = read_header(_shard(directory))
        change(header)
        write_header(_shard(directory), json.dumps(header).encode())
        resign_file(_shard(directory))

    return make


def _long_header(directory: Path, scratch: Path) -> None:
    write_header(_shard(directory), b"{}", length=2**62)
    resign_file(_shard(directory))


def _deep_header(directory: Path, scratch: Path) -> None:
    write_header(_shard(directory), b'{"a":' * 100_000)
    resign_file(_shard(directory))


def _aliased(header: Content) -> None:
    """Two tensors of one size on the same bytes, and bytes that no tensor has."""
    widest = sorted((value for key, value in header.items() if key != "__metadata__"), key=lambda v: v["data_offsets"])
    first, second = [value for value in widest if value["shape"] == widest[0]["shape"]][:2]
    second["data_offsets"] = first["data_offsets"]


def _other_dtype(header: Content) -> None:
    for key, value in header.items():
        if key != "__metadata__" and value["dtype"] == "F32":
            value["dtype"] = "I32"


def _link(name: str | None) -> Maker:
    def make(directory: Path, scratch: Path) -> None:
        path = directory / name if name else _shard(directory)
        shutil.move(path, scratch / "target")
        path.symlink_to(scratch / "target")

    return make


def _node(name: str | None, kind: int, device: int = 0) -> Maker:
    def make(directory: Path, scratch: Path) -> None:
        path = directory / name if name else _shard(directory)
        path.unlink()
        os.mknod(path, kind | 0o600, device)

    return make


def _nested(directory: Path, scratch: Path) -> None:
    (directory / MANIFEST).write_text('{"config":' * 100_000)


def _nested_near_the_limit(directory: Path, scratch: Path) -> None:
    """Deep enough to be parsed, too deep to be written again for the checksum."""
    depth = sys.getrecursionlimit() - 50
    text = '{"format_version":2,"data":' + '{"a":' * depth + "1" + "}" * depth + "}"
    (directory / MANIFEST).write_text(text)


def _many_digits(directory: Path, scratch: Path) -> None:
    path = directory / MANIFEST
    path.write_text(path.read_text().replace("{", f'{{"a":{"9" * 100_000},', 1))


HOSTILE: dict[str, Maker] = {
    "a name that leads outside": _traversal,
    "an absolute name": _absolute,
    "a pickle as .metadata": _metadata,
    "a pickle as data": _pickle,
    "a zip of a pickle as data": _zip_of_pickle,
    "a zip bomb as data": _zip_bomb,
    "a shape of 10**18": _signed(_huge_shape),
    "a file of 2**63 bytes": _signed(lambda c: c["files"][0].update(bytes=2**63)),
    "a file of 2**62 bytes": _signed(lambda c: c["files"][0].update(bytes=2**62)),
    "a header of 2**62 bytes": _long_header,
    "a key twice in the manifest": _twice_in_manifest,
    "a key twice in a header": _twice_in_header,
    "a file listed twice": _signed(lambda c: c["files"].append(c["files"][0])),
    "a region used twice": _signed(lambda c: c["tensors"].update({"model.new": _tensor(c)})),
    "regions that overlap": _signed(lambda c: _tensor(c)["chunks"][1].update(offsets=[0, 0])),
    "a region outside": _signed(lambda c: _tensor(c)["chunks"][-1].update(offsets=[10**6, 0])),
    "keys on the same bytes": _header(_aliased),
    "another type of the same width": _header(_other_dtype),
    "a data file that is a link": _link(None),
    "a data file that is a FIFO": _node(None, stat.S_IFIFO),
    "a data file that is a device": _node(None, stat.S_IFCHR, os.makedev(1, 5)),
    "a manifest that is a link": _link(MANIFEST),
    "a manifest that is a FIFO": _node(MANIFEST, stat.S_IFIFO),
    "a manifest nested 100,000 deep": _nested,
    "a header nested 100,000 deep": _deep_header,
    "a manifest nested 950 deep": _nested_near_the_limit,
    "escape characters in a name": _signed(lambda c: c["tensors"].update({"\x1b[2J\r": c["tensors"].popitem()[1]})),
    "another format version": _signed(lambda c: c.update(format_version=99)),
    "a negative count": _signed(lambda c: c.update(tokens=-1)),
    "a negative size": _signed(lambda c: _tensor(c)["chunks"][0].update(sizes=[-1, 1])),
    "a float as a count": _signed(lambda c: c.update(step=2.0)),
    "a bool as a count": _signed(lambda c: c.update(world_size=True)),
    "a number of 100,000 digits": _many_digits,
    "a checksum that is no number": _signed(lambda c: c["files"][0].update(crc32="zzzzzzzz")),
    "another step than its name": _signed(lambda c: c.update(step=10**6)),
}
"""What it is, in words, and how to make it of a sound checkpoint's directory."""
MAY_GO_UNSAID = ("a manifest that is a FIFO",)
"""Such a directory may count as one that was never committed."""
