"""The manifest refuses whatever was changed, torn, or made to lead outside."""

import hashlib
import json
import subprocess
import sys

import pytest

from disttrain.checkpoint.manifest import (
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    committed_steps,
    read_manifest,
    step_directory,
    verify_files,
    write_manifest,
)
from disttrain.errors import UserError


def box(offsets, sizes, file="a.safetensors"):
    return Chunk(file, "x", offsets, sizes)


WHOLE = (box((0, 0), (4, 6)),)


def manifest(chunks=WHOLE, shape=(4, 6), file="a.safetensors", config=None) -> Manifest:
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
        files=(FileEntry(file, 0, "00000000"),),
        tensors={"x": TensorEntry("float32", shape, chunks)},
    )


def rewrite(directory, change) -> None:
    """Change the content and sign it again, as somebody who means harm would."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(content | {"sha256": hashlib.sha256(canonical.encode()).hexdigest()}))


def test_it_comes_back_as_written(tmp_path):
    written = manifest(config={"lr": 1e-3, "name": "é", "none": None, "list": [1, 2.5]})
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
        ((box((0, 0), (4, 6)), box((0, 0), (4, 6))), (4, 6), "overlap"),
        ((box((0, 0), (3, 6)), box((2, 0), (1, 6))), (4, 6), "overlap"),
        ((box((0, 0), (2, 6)), box((1, 0), (2, 6))), (4, 6), "overlap"),
        ((box((1, 0), (4, 6)),), (4, 6), "outside shape"),
        ((box((0,), (4,)),), (4, 6), "outside shape"),
        ((box((-1, 0), (4, 6)),), (4, 6), "not a count"),
        ((box((0.0, 0), (4, 6)),), (4, 6), "not a count"),
        ((box((0, 0), (4, 6), file="b.safetensors"),), (4, 6), "not one of the checkpoint's files"),
        ((box((), ()), box((), ())), (), "overlap"),
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
        (lambda content: content.update(format_version=2), "format_version is 2, this disttrain reads 1"),
        (lambda content: content.pop("format_version"), "format_version is None"),
        (lambda content: content.pop("tokens"), "malformed .*tokens"),
        (lambda content: content.update(step=True), "malformed"),
        (lambda content: content.update(tensors=[1]), "malformed"),
        (lambda content: content.update(files="abc"), "malformed"),
        (lambda content: content.update(config=3), "malformed"),
    ],
)
def test_malformed_content_is_refused_even_when_signed(tmp_path, change, words):
    write_manifest(tmp_path, manifest())
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=words):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, "\x00", '{"format_version": 1}'])
def test_other_content_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        read_manifest(tmp_path)


def test_missing_manifest(tmp_path):
    with pytest.raises(UserError, match="cannot read: No such file"):
        read_manifest(tmp_path)


def test_verify_files_tells_every_problem(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"123456789")
    good = FileEntry("a.safetensors", 9, "cbf43926")
    entries = [good, FileEntry("a.safetensors", 8, "cbf43926"), FileEntry("a.safetensors", 9, "0" * 8)]
    entries += [FileEntry("b.safetensors", 1, "0" * 8)]
    fields = vars(manifest()) | {"files": tuple(entries)}
    problems = verify_files(tmp_path, Manifest(**fields))
    assert len(problems) == 3
    assert "9 bytes, the manifest says 8 (+1)" in problems[0]
    assert "crc32 is cbf43926, the manifest says 00000000" in problems[1]
    assert "b.safetensors: cannot read" in problems[2]


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
