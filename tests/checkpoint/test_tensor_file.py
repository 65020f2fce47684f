"""The files are plain safetensors, read here by the library itself."""

import errno
import json
import zlib
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from disttrain.checkpoint.tensor_file import SAFETENSORS_NAMES, Box, read_region, write_safetensors
from disttrain.errors import StorageError


def boxes(**tensors: torch.Tensor) -> list[Box]:
    return [Box.of(key, tensor) for key, tensor in tensors.items()]


def raw_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_every_dtype_survives_and_the_library_reads_it(tmp_path):
    tensors = {str(dtype): (torch.arange(15) % 2).to(dtype).reshape(3, 5) for dtype in SAFETENSORS_NAMES}
    tensors |= {"scalar": torch.tensor(2.5), "strided": torch.arange(12.0).reshape(3, 4).t()}
    tensors |= {"nan": torch.tensor([float("nan"), -0.0, float("inf")])}
    path = tmp_path / "rank-00000.safetensors"
    entry = write_safetensors(path, boxes(**tensors), {"run_id": "run-é", "step": "3"})
    content = path.read_bytes()
    assert (entry.name, entry.bytes, entry.crc32) == (path.name, len(content), f"{zlib.crc32(content):08x}")
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert raw_bytes(loaded[name]) == raw_bytes(tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"run_id": "run-é", "step": "3"}


def test_every_tensor_is_aligned_to_its_element(tmp_path):
    path = tmp_path / "a.safetensors"
    dtypes = (torch.uint8, torch.float64, torch.bfloat16, torch.float32)
    write_safetensors(
        path, [Box.of(f"{i}", torch.ones(3, dtype=dtype)) for i, dtype in enumerate(dtypes)], {"padding": "abc"}
    )
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for i, dtype in enumerate(dtypes):
        assert header[f"{i}"]["data_offsets"][0] % dtype.itemsize == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_boxes_are_read_alone(tmp_path, dtype):
    tensor = (torch.arange(2 * 5 * 3) % 7).to(dtype).reshape(2, 5, 3)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, boxes(x=tensor, s=torch.tensor(1.0)), {})
    with safe_open(path, framework="pt") as file:
        assert torch.equal(read_region(file, "x", (1, 2, 0), (1, 3, 2), dtype), tensor[1:2, 2:5, 0:2])
        assert torch.equal(read_region(file, "s", (), (), torch.float32), torch.tensor(1.0))
        with pytest.raises(ValueError, match="expected"):
            read_region(file, "x", (0, 4, 0), (1, 3, 3), dtype)
        with pytest.raises(ValueError, match="expected"):
            read_region(file, "x", (0, 0, 0), (1, 3, 3), torch.float64)


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, boxes(x=torch.ones(1)), {})
    with pytest.raises(StorageError, match="File exists"):
        write_safetensors(path, boxes(x=torch.zeros(1)), {})
    assert load_file(path)["x"].item() == 1


def test_disk_errors_say_what_was_needed(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch("os.fsync", side_effect=full),
        pytest.raises(StorageError, match=r"[\d,]+ of [\d,]+ bytes written; [\d,]+ bytes free"),
    ):
        write_safetensors(tmp_path / "a.safetensors", boxes(x=torch.ones(1)), {})
    with pytest.raises(StorageError, match="it was removed"):
        write_safetensors(tmp_path / "absent" / "a.safetensors", boxes(x=torch.ones(1)), {})


def test_a_box_is_read_when_its_turn_comes_and_must_be_what_was_promised(tmp_path):
    path = tmp_path / "a.safetensors"
    lazy = Box("x", torch.float32, (2, 3), lambda: torch.ones(2, 3))
    assert write_safetensors(path, [lazy], {}).bytes == path.stat().st_size
    assert load_file(path)["x"].sum() == 6
    with pytest.raises(ValueError, match="promised"):
        write_safetensors(tmp_path / "b.safetensors", [Box("x", torch.float32, (2, 2), lazy.read)], {})
