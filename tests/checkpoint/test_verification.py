"""A data file counts only when it is the very file that its manifest describes; nothing in it is run or unpacked."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
import zlib

import pytest
import torch

from disttrain.checkpoint.manifest import Chunk, FileEntry, Manifest, TensorEntry, read_manifest, write_manifest
from disttrain.checkpoint.placement import STORED_DTYPES
from disttrain.checkpoint.tensor_file import SAFETENSORS_NAMES, Box, write_safetensors
from disttrain.checkpoint.verification import missing_bytes, verify_file, verify_files

NAME = "a.safetensors"
ABOUT = {"run_id": "r", "step": "1"}


def manifest(*files, tensors=None) -> Manifest:
    numbers = {"step": 1, "samples": 2, "tokens": 3, "world_size": 1}
    tables = {"config": {}, "data": {}, "versions": {}}
    return Manifest(run_id="r", strategy="ddp", files=files, tensors=tensors or {}, **numbers, **tables)


def tensors(dtype="float32", sizes=(4, 6), key="x", extra=False) -> dict:
    found = {"x": TensorEntry(dtype, sizes, (Chunk(NAME, key, (0,) * len(sizes), sizes),))}
    return found | {"y": TensorEntry("int8", (3,), (Chunk(NAME, "y", (0,), (3,)),))} if extra else found


def entry_of(path) -> FileEntry:
    content = path.read_bytes()
    return FileEntry(path.name, len(content), f"{zlib.crc32(content):08x}")


def problem_with(directory, promised=None) -> str | None:
    """What is wrong with a file whose size and checksum a signed manifest states."""
    entry = entry_of(directory / NAME)
    written = manifest(entry, tensors=promised or tensors())
    write_manifest(directory, written)
    assert read_manifest(directory) == written
    return verify_file(directory, written, entry)


def written(directory, boxes=None, about=ABOUT) -> None:
    write_safetensors(directory / NAME, boxes or [Box.of("x", torch.ones(4, 6))], about)


def by_hand(directory, header, data=bytes(96), length=None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / NAME).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def header(**changes) -> dict:
    return {"__metadata__": ABOUT, "x": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]} | changes}


def test_what_we_write_verifies(tmp_path):
    state = {str(dtype): torch.zeros(3, 2, dtype=dtype) for dtype in SAFETENSORS_NAMES} | {"scalar": torch.ones(())}
    written(tmp_path, [Box.of(name, tensor) for name, tensor in state.items()])
    promised = {}
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        chunk = Chunk(NAME, name, (0,) * len(shape), shape)
        promised[name] = TensorEntry(str(tensor.dtype).removeprefix("torch."), shape, (chunk,))
    assert problem_with(tmp_path, promised) is None
    assert {
        str(dtype).removeprefix("torch."): (name, dtype.itemsize) for dtype, name in SAFETENSORS_NAMES.items()
    } == STORED_DTYPES


def test_every_problem_is_told(tmp_path):
    written(tmp_path)
    good = entry_of(tmp_path / NAME)
    entries = (good, FileEntry(NAME, good.bytes - 1, good.crc32), FileEntry(NAME, good.bytes, "0" * 8))
    entries += (FileEntry("b.safetensors", 1, "0" * 8),)
    problems = verify_files(tmp_path, manifest(*entries, tensors=tensors()))
    assert len(problems) == 3
    assert f"{good.bytes} bytes, the manifest says {good.bytes - 1} (+1)" in problems[0]
    assert f"crc32 is {good.crc32}, the manifest says 00000000" in problems[1]
    assert "b.safetensors: cannot read: No such file" in problems[2]
    assert missing_bytes(tmp_path, manifest(*entries)) == [problems[0], problems[2]]


@pytest.mark.parametrize(
    ("promised", "words"),
    [
        (tensors(key="z"), "a key that the manifest lacks: 'x'"),
        (tensors(extra=True), "has no key 'y'"),
        (tensors("int32"), "x: 'F32' (4, 6), the manifest says 'I32' (4, 6)"),
        (tensors(sizes=(6, 4)), "x: 'F32' (4, 6), the manifest says 'F32' (6, 4)"),
    ],
)
def test_other_tensors_than_the_manifests_are_refused(tmp_path, promised, words):
    written(tmp_path)
    assert words in problem_with(tmp_path, promised)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"run_id": "other", "step": "1"}, "its run_id is 'other', the manifest says 'r'"),
        ({"run_id": "r", "step": "2"}, "its step is '2', the manifest says '1'"),
        ({}, "its run_id is None"),
    ],
)
def test_a_file_of_another_run_or_step_is_refused(tmp_path, about, words):
    written(tmp_path, about=about)
    assert words in problem_with(tmp_path)


def test_the_headers_by_hand_are_right(tmp_path):
    by_hand(tmp_path, header())
    assert problem_with(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(data_offsets=[0, 92]), "are not 96 bytes long"),
        (header(data_offsets=[8, 104]), "overlap, leave gaps or end elsewhere"),
        (header(data_offsets=[2**62, 2**62 + 96]), "overlap, leave gaps or end elsewhere"),
        (header(data_offsets=[-96, 0]), "not a count"),
        (header(data_offsets=[0.0, 96.0]), "not a count"),
        (header(data_offsets=[0, 96, 0]), "are not 96 bytes long"),
        (header(data_offsets=None), "not a list of counts"),
        (header(shape=[4, True]), "not a count"),
        (header(shape=[2**40, 2**40]), "the manifest says"),
        (header(dtype=["F32"]), "the manifest says"),
        ({"x": header()["x"]}, "None is not a table"),
        ({"__metadata__": ABOUT, "x": 3}, "int"),
        (header() | {"y\x1b[2J": header()["x"]}, "'y\\x1b[2J'"),
        ([], "not a table"),
        (b"", "not the safetensors file"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "'__metadata__' appears twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "utf-8"),
        (json.dumps(header()).encode("utf-16"), "utf-8"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, content, words):
    by_hand(tmp_path, content)
    problem = problem_with(tmp_path)
    assert words in problem
    assert problem.isprintable()


def test_regions_that_share_bytes_or_leave_some_are_refused(tmp_path):
    other = {"dtype": "I8", "shape": [3], "data_offsets": [93, 96]}
    by_hand(tmp_path, header() | {"y": other})
    assert "overlap" in problem_with(tmp_path, tensors(extra=True))
    (tmp_path / "manifest.json").unlink()
    by_hand(tmp_path, header(), data=bytes(97))
    assert "end elsewhere" in problem_with(tmp_path)


@pytest.mark.parametrize("length", [2**62, 2**64 - 1, 100_000_001, 400])
def test_absurd_header_lengths_are_refused(tmp_path, length):
    by_hand(tmp_path, header(), length=length)
    assert f"its header would have {length:,} of" in problem_with(tmp_path)


def test_a_header_beyond_the_limit_is_not_parsed(tmp_path):
    with (tmp_path / NAME).open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_200)
    assert "its header would have 100,000,001 of" in problem_with(tmp_path)


def test_files_too_short_for_a_header_are_refused(tmp_path):
    for content in (b"", b"1234567"):
        (tmp_path / NAME).write_bytes(content)
        entry = entry_of(tmp_path / NAME)
        assert "not safetensors" in (verify_file(tmp_path, manifest(entry), entry) or "")


class Trap:
    """Unpickling makes a file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_pickle_is_refused_and_never_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / NAME).write_bytes(pickle.dumps([Trap(str(marker)), bytes(200)]))
    assert "not safetensors" in problem_with(tmp_path)
    assert not marker.exists()
    pickle.loads((tmp_path / NAME).read_bytes())
    assert marker.exists()


def test_what_torch_saves_is_refused(tmp_path):
    torch.save({"x": torch.ones(4, 6)}, tmp_path / NAME)
    assert "not safetensors" in problem_with(tmp_path)


def test_a_zip_bomb_is_refused_and_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(50 * 2**20))
    assert (tmp_path / NAME).stat().st_size < 2**17
    assert "not safetensors" in problem_with(tmp_path)


@pytest.mark.timeout(20)
def test_only_plain_files_are_opened(tmp_path):
    path, passwd = tmp_path / NAME, entry_of(type(tmp_path)("/etc/passwd"))
    entry = FileEntry(NAME, passwd.bytes, passwd.crc32)
    promised = manifest(entry)
    path.symlink_to("/etc/passwd")
    assert_refused(tmp_path, promised, "it is a symbolic link, not a plain file")
    path.unlink()
    os.mkfifo(path)
    assert_refused(tmp_path, promised, "it is a FIFO")
    path.unlink()
    path.mkdir()
    assert_refused(tmp_path, promised, "it is a directory")


def assert_refused(directory, promised, words) -> None:
    [problem] = verify_files(directory, promised)
    assert words in problem
    assert missing_bytes(directory, promised) == [problem]


def test_a_file_of_another_size_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(2**40)
    monkeypatch.setattr("pathlib.Path.open", None)
    [problem] = verify_files(tmp_path, manifest(FileEntry(NAME, 96, "0" * 8)))
    assert "1,099,511,627,776 bytes, the manifest says 96 (+1,099,511,627,680)" in problem


def test_verifying_needs_no_torch():
    check = "import sys, disttrain.checkpoint.verification; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
