"""The mesh and batch arithmetic, and the products in its refusals."""

import dataclasses
import re

import pytest

from disttrain.config import ModelConfig, ParallelDims
from disttrain.config.layout import check_batches, microbatch_sizes
from disttrain.schedule import constant_batch, linear_ramp


@pytest.mark.parametrize("world", [1, 2, 7, 8])
def test_defaults_take_all_processes(world: int) -> None:
    assert ParallelDims.resolve("ddp", None, None, world) == ParallelDims(world, 1)
    assert ParallelDims.resolve("fsdp", None, None, world) == ParallelDims(1, world)
    assert ParallelDims.resolve("ddp", world, 1, world).batch == world
    assert ParallelDims.resolve("fsdp", 1, world, world).batch == world


@pytest.mark.parametrize(
    ("strategy", "replicate", "shard", "world", "said"),
    [
        ("fsdp", None, 2, 4, ["dp_replicate 1 x dp_shard 2 = 2 processes, but there are 4", "--nproc 2"]),
        ("fsdp", 1, 8, 3, ["dp_replicate 1 x dp_shard 8 = 8 processes, but there are 3", "--nproc 8"]),
        ("ddp", 3, None, 4, ["dp_replicate 3 x dp_shard 1 = 3 processes, but there are 4", "--nproc 3"]),
        ("ddp", None, 2, 2, ["parallel.dp_shard = 2", "set it to 1 or use fsdp"]),
        ("fsdp", 2, None, 4, ["parallel.dp_replicate = 2", "use hsdp"]),
    ],
)
def test_meshes_that_do_not_multiply(
    strategy: str, replicate: int | None, shard: int | None, world: int, said: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"parallel|processes") as refused:
        ParallelDims.resolve(strategy, replicate, shard, world)
    assert [part for part in said if part not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("samples", "ranks", "said"),
    [
        (64, 3, "train.global_batch_tokens = 4096 is not a multiple of sequence_length 64 x 3 processes = 192"),
        (64, 3, "nearest: 4032 or 4224"),
        (1, 2, "nearest: 128"),
    ],
)
def test_batches_that_do_not_divide(samples: int, ranks: int, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        check_batches(constant_batch(samples, 64), ranks)


def test_every_batch_of_a_ramp_must_divide() -> None:
    check_batches(linear_ramp(4, 16, 1_000, 4, 64), 4)
    with pytest.raises(ValueError, match=r"the batch from token 333 on = 384 .* nearest: 256 or 512"):
        check_batches(linear_ramp(4, 10, 1_000, 2, 64), 4)


@pytest.mark.parametrize(
    ("samples", "most", "sizes"), [(8, 4, [4, 4]), (7, 4, [4, 3]), (3, 4, [3]), (9, 2, [2, 2, 2, 2, 1])]
)
def test_microbatches(samples: int, most: int, sizes: list[int]) -> None:
    assert microbatch_sizes(samples, most) == sizes


def test_plans_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParallelDims(1, 2).dp_shard = 3  # type: ignore[misc]


def test_widths_of_the_model() -> None:
    assert ModelConfig(d_model=96, n_heads=6).ff_width == 384
    assert ModelConfig(d_model=96, n_heads=6, mlp="swiglu").ff_width == 256
    assert ModelConfig(d_model=100, n_heads=5, mlp="swiglu").ff_width == 288  # 266.7 up to a multiple of 32
    assert ModelConfig(d_model=96, n_heads=6, d_ff=7, mlp="swiglu").ff_width == 7
    assert (ModelConfig(n_kv_heads=2).kv_heads, ModelConfig().kv_heads) == (2, 6)
    with pytest.raises(ValueError, match="d_model / n_heads = 5 must be even"):
        ModelConfig(d_model=15, n_heads=3, position="rope")
