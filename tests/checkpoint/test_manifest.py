"""The manifest refuses whatever was changed, torn, or made to lead outside."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest

from disttrain.checkpoint.manifest import (
    MANIFEST_LIMIT_BYTES,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    committed_steps,
    read_manifest,
    sealed,
    step_directory,
    write_manifest,
)
from disttrain.errors import UserError


def box(offsets, sizes, file="a.safetensors", key=None):
    return Chunk(file, f"x{offsets}+{sizes}" if key is None else key, offsets, sizes)


WHOLE = (box((0, 0), (4, 6)),)


def manifest(chunks=WHOLE, shape=(4, 6), file="a.safetensors", config=None, extra=None) -> Manifest:
    return Manifest(
        run_id="r",
        step=1,
        samples=2,
        tokens=3,
        world_size=1,
        strategy="ddp",
        config=config or {},
        data={},
        versions={},
        files=(FileEntry(file, 96, "00000000"),),
        tensors={"x": TensorEntry("float32", shape, chunks)},
        extra=extra or {},
    )


def rewrite(directory, change) -> None:
    """Change the content and sign it again, as somebody who means harm would."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    sign(directory, content)


def sign(directory, content) -> None:
    (directory / "manifest.json").write_text(sealed(json.dumps(content, sort_keys=True, separators=(",", ":"))))


def test_it_comes_back_as_written(tmp_path):
    written = manifest(config={"lr": 1e-3, "name": "é", "none": None, "list": [1, 2.5]}, extra={"wandb": {"id": "x7"}})
    write_manifest(tmp_path, written)
    assert read_manifest(tmp_path) == written


def test_what_json_changes_does_not_break_the_checksum(tmp_path):
    write_manifest(tmp_path, manifest(config={2: "a", 10: "b", "pair": (1, 2)}))
    assert read_manifest(tmp_path).config == {"2": "a", "10": "b", "pair": [1, 2]}


@pytest.mark.parametrize(
    "chunks",
    [
        (box((0, 0), (4, 6)),),
        (box((0, 0), (1, 6)), box((1, 0), (2, 6)), box((3, 0), (1, 6))),
        (box((0, 0), (2, 3)), box((2, 0), (2, 3)), box((0, 3), (4, 3))),
    ],
)
def test_tilings_are_accepted(tmp_path, chunks):
    write_manifest(tmp_path, manifest(chunks))
    assert read_manifest(tmp_path).tensors["x"].chunks == chunks


def test_scalars_and_empty_tensors_are_accepted(tmp_path):
    write_manifest(tmp_path, manifest((box((), ()),), shape=()))
    assert read_manifest(tmp_path).tensors["x"].shape == ()
    (tmp_path / "manifest.json").unlink()
    write_manifest(tmp_path, manifest((), shape=(0, 6)))
    assert read_manifest(tmp_path).tensors["x"].chunks == ()


@pytest.mark.parametrize(
    ("chunks", "shape", "words"),
    [
        ((box((0, 0), (3, 6)),), (4, 6), "hold 18 elements"),
        ((box((0, 0), (2, 6)), box((0, 0), (2, 6), key="y")), (4, 6), "overlap"),
        ((box((0, 0), (3, 6)), box((2, 0), (1, 6))), (4, 6), "overlap"),
        ((box((0, 0), (2, 6)), box((1, 0), (2, 6))), (4, 6), "overlap"),
        ((box((0, 0), (2, 6)), box((1, 0), (2, 3)), box((3, 0), (1, 6))), (4, 6), "overlap"),
        ((box((0, 0), (2, 3)), box((2, 3), (2, 3)), box((0, 0), (4, 3), key="y")), (4, 6), "overlap"),
        ((box((0, 0), (4, 6)), box((4, 0), (0, 6))), (4, 6), "is empty"),
        ((box((0, 0), (2, 6), key="y"), box((2, 0), (2, 6), key="y")), (4, 6), "appears twice"),
        ((box((0, 0), (10**18, 6)),), (10**18, 6), "bytes more than it has"),
        ((box((0, 0), (2**63, 6)),), (2**63, 6), "not a count"),
        ((box((0, 0), (5, 5)),), (5, 5), "would need 4 bytes more than it has"),
        ((box((0,) * 33, (1,) * 33),), (1,) * 33, "33 dims, at most 32"),
        (tuple(box(at, (1,) * 5) for at in product((0, 1), repeat=5)), (2,) * 5, "bytes more than it has"),
        ((box((1, 0), (4, 6)),), (4, 6), "outside shape"),
        ((box((0,), (4,)),), (4, 6), "outside shape"),
        ((box((-1, 0), (4, 6)),), (4, 6), "not a count"),
        ((box((0.0, 0), (4, 6)),), (4, 6), "not a count"),
        ((box((0, 0), (4, 6), file="b.safetensors"),), (4, 6), "not one of the checkpoint's files"),
        ((box((), ()), box((), (), key="y")), (), "hold 2 elements"),
        ((), (4, 6), "hold 0 elements"),
    ],
)
def test_regions_that_do_not_tile_are_refused(tmp_path, chunks, shape, words):
    write_manifest(tmp_path, manifest(chunks, shape))
    with pytest.raises(UserError, match=words):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a.bin", "a\\b.safetensors", 3]
)
def test_file_names_never_lead_outside(tmp_path, name):
    write_manifest(tmp_path, manifest((box((0, 0), (4, 6), file=name),), file=name))
    with pytest.raises(UserError, match="not a plain"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format_version=3), "is 3, .*written by a newer disttrain; upgrade"),
        (lambda content: content.update(format_version="2"), "format_version is '2', this disttrain reads 1 to 2"),
        (lambda content: content.update(format_version=0), "format_version is 0"),
        (lambda content: content.update(format_version=True), "format_version is True"),
        (lambda content: content.pop("format_version"), "format_version is None"),
        (lambda content: content.pop("tokens"), "malformed .*tokens"),
        (lambda content: content.update(step=True), "malformed"),
        (lambda content: content.update(tensors=[1]), "malformed"),
        (lambda content: content.update(files="abc"), "malformed"),
        (lambda content: content.update(config=3), "malformed"),
        (lambda content: content.update(extra=[]), "not a table"),
        (lambda content: content.update(run_id="r\x1b[2J"), "printable"),
        (lambda content: content.update(run_id=7), "printable"),
        (lambda content: content.update(strategy="fsdp\n"), "printable"),
        (lambda content: content.update(strategy="x" * 5000), "at most 4,096 characters"),
        (lambda content: content.update(versions={"torch": "\u202e2.11"}), "printable"),
        (lambda content: content["tensors"].update({"\x1b]0;x\x07": content["tensors"].pop("x")}), "printable"),
        (lambda content: content["tensors"]["x"]["chunks"][0].update(key="\r"), "printable"),
        (lambda content: content["tensors"]["x"].update(dtype="object"), "cannot be 'object'"),
        (lambda content: content["tensors"]["x"].update(dtype=["float32"]), "malformed"),
        (lambda content: content["tensors"]["x"].update(shape="46"), "not a list of counts"),
        (lambda content: content["files"].append(content["files"][0]), "2 files have 1 different names"),
        (lambda content: content["files"][0].update(bytes=2**63), "not a count"),
        (lambda content: content["files"][0].update(crc32="0000000G"), "eight hexadecimal"),
        (lambda content: content["files"][0].update(crc32=0), "eight hexadecimal"),
        (lambda content: content["files"][0].update(crc32="00000000\n"), "eight hexadecimal"),
        (lambda content: content["tensors"].update(y=content["tensors"]["x"]), "appears twice"),
    ],
)
def test_malformed_content_is_refused_even_when_signed(tmp_path, change, words):
    write_manifest(tmp_path, manifest())
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=words) as caught:
        read_manifest(tmp_path)
    [line] = caught.value.problems
    assert line.isprintable()
    assert len(line) < len(str(tmp_path)) + 300


def test_a_tensor_cut_along_many_dims_is_refused(tmp_path):
    chunks = tuple(box(at, (1,) * 5) for at in product((0, 1), repeat=5))
    write_manifest(tmp_path, manifest(chunks, (2,) * 5))
    rewrite(tmp_path, lambda content: content["files"][0].update(bytes=128))
    with pytest.raises(UserError, match="cut along 5 dims, at most 4"):
        read_manifest(tmp_path)


def test_the_format_before_is_read(tmp_path):
    written = manifest(config={"lr": 1e-3})
    write_manifest(tmp_path, written)

    def as_version_1(content) -> None:
        content["format_version"] = 1
        del content["extra"]

    rewrite(tmp_path, as_version_1)
    assert read_manifest(tmp_path) == written
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"extra": {}}))
    with pytest.raises(UserError, match="sha256 does not match"):
        read_manifest(tmp_path)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_manifest(tmp_path, manifest(extra={"loss": float("nan")}))
    with pytest.raises(ValueError, match="printable"):
        write_manifest(tmp_path, Manifest(**vars(manifest()) | {"run_id": "a\nb"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format_version": 1, "format_version": 2}', "'format_version' appears twice"),
        ('{"format_version": 2, "config": {"a": 1, "b": 2, "a": 3}}', "'a' appears twice"),
        ('{"format_version": 2, "step": NaN}', "NaN is not JSON"),
        ('{"format_version": 2, "step": -Infinity}', "-Infinity is not JSON"),
        ('{"format_version": 2, "step": 1e999}', "beyond the largest"),
        ('{"a":' * 100_000, "nested too deeply"),
        (f'{{"format_version": {"9" * 5000}}}', "not valid JSON"),
        (f'{{"format_version": {"9" * 4000}}}', "newer disttrain"),
    ],
)
def test_json_that_readers_understand_in_different_ways_is_refused(tmp_path, text, words):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_manifest(tmp_path)


def test_infinity_spelled_as_a_number_is_refused_even_when_signed(tmp_path):
    write_manifest(tmp_path, manifest())
    rewrite(tmp_path, lambda content: content["config"].update(lr=float("inf")))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("Infinity", "1e999"))
    with pytest.raises(UserError, match="beyond the largest"):
        read_manifest(tmp_path)


@pytest.mark.timeout(20)
def test_only_a_plain_file_is_opened(tmp_path):
    path = tmp_path / "manifest.json"
    os.mkfifo(path)
    with pytest.raises(UserError, match="it is a FIFO, not a plain file"):
        read_manifest(tmp_path)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="it is a symbolic link"):
        read_manifest(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="it is a directory"):
        read_manifest(tmp_path)


def test_a_huge_manifest_is_not_read(tmp_path):
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(MANIFEST_LIMIT_BYTES + 1)
    with pytest.raises(UserError, match="1,073,741,825 bytes, a manifest has at most 1,073,741,824"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, "\x00", '{"format_version": 1}', "\ufeff{}"])
def test_other_content_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        read_manifest(tmp_path)


def test_missing_manifest(tmp_path):
    with pytest.raises(UserError, match="cannot read: No such file"):
        read_manifest(tmp_path)


def test_committed_steps_are_newest_first_and_need_a_manifest(tmp_path):
    for name in ("step-00000002", "step-00000010", "step-00000001", "step-00000011.tmp-ab", "step-3", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    step_directory(tmp_path, 12).mkdir()
    assert [path.name for path in committed_steps(tmp_path)] == ["step-00000010", "step-00000002", "step-00000001"]
    assert committed_steps(tmp_path / "absent") == []


def test_the_manifest_needs_no_torch():
    check = "import sys, disttrain.checkpoint.manifest; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
