"""Sums over bits, who holds the same weights, and the vote."""

from __future__ import annotations

import pytest
import torch

from disttrain.config import ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.parallel.replicas import odd_ones, replica_groups, total_sum, weight_sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (64,), (0, 4), (7, 9)])
def test_every_bit_counts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight_sums([tensor])
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    for index in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            value = tensor.view(-1)[index : index + 1].view(integers)
            mask = torch.tensor([1], dtype=integers) << bit
            value.bitwise_xor_(mask)
            assert weight_sums([tensor]) != before
            value.bitwise_xor_(mask)
    assert weight_sums([tensor]) == before
    assert torch.equal(weight_sums([tensor, tensor.clone()]), before.repeat(2))


def test_more_than_one_bit() -> None:
    """The same bit of two numbers in different rows, also the sign; rows and parameters that change places."""
    one = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    for bit in (0, 16, 30, 31):
        other = one.clone()
        for index in (1, 20_001):
            other.view(torch.int32)[index] ^= -(2**31) if bit == 31 else 1 << bit
        assert weight_sums([other]) != weight_sums([one])
    moved = one.view(5, -1)[[1, 0, 2, 3, 4]]
    assert weight_sums([moved]) != weight_sums([one])
    pair = weight_sums([one, moved])
    assert total_sum(pair) != total_sum(pair.flip(0))


def test_a_view_has_the_sum_of_its_copy() -> None:
    whole = torch.randn(33, 5)
    for part in (whole[1:], whole[:, 1:3], whole.T, whole.view(-1)[3:14]):
        assert weight_sums([part]) == weight_sums([part.clone().contiguous()])


@pytest.mark.parametrize(
    ("settings", "world", "groups"),
    [
        ({"strategy": "ddp"}, 3, [[0, 1, 2]]),
        ({"strategy": "zero1"}, 2, [[0, 1]]),
        ({"strategy": "zero2"}, 4, [[0, 1, 2, 3]]),
        ({"strategy": "fsdp"}, 4, []),
        ({"strategy": "hsdp", "dp_replicate": 2}, 4, [[0, 2], [1, 3]]),
        ({"strategy": "hsdp", "dp_replicate": 4}, 4, [[0, 1, 2, 3]]),
        ({"strategy": "hsdp", "dp_replicate": 1}, 4, []),
        ({"strategy": "ddp"}, 1, []),
    ],
)
def test_who_holds_the_same(settings: dict[str, object], world: int, groups: list[list[int]]) -> None:
    config = ParallelConfig.model_validate(settings)
    dims = ParallelDims.resolve(config.strategy, config.dp_replicate, config.dp_shard, world)
    assert replica_groups(config, dims) == groups


@pytest.mark.parametrize(
    ("sums", "groups", "found"),
    [
        ([7, 7, 7], [[0, 1, 2]], ([], [])),
        ([7, 8, 7], [[0, 1, 2]], ([1], [])),
        ([7, 8], [[0, 1]], ([], [0, 1])),
        ([7, 8, 9], [[0, 1, 2]], ([], [0, 1, 2])),
        ([7, 7, 8, 8], [[0, 1, 2, 3]], ([], [0, 1, 2, 3])),
        ([1, 2, 1, 3], [[0, 2], [1, 3]], ([], [1, 3])),
        ([1, 2, 1, 2, 5, 2], [[0, 2, 4], [1, 3, 5]], ([4], [])),
    ],
)
def test_the_vote(sums: list[int], groups: list[list[int]], found: tuple[list[int], list[int]]) -> None:
    assert odd_ones(sums, groups) == found
