"""The mesh and batch arithmetic, and the products in its refusals."""

import dataclasses

import pytest

from disttrain.config import BatchPlan, ModelConfig, ParallelDims


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


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_same_samples_on_every_world(world: int) -> None:
    plan = BatchPlan.resolve(global_batch_tokens=4096, sequence_length=64, microbatch=4, batch_ranks=world)
    assert plan == BatchPlan(samples=64, batch_ranks=world, accumulation=16 // world, microbatch=4)
    assert plan.samples == plan.batch_ranks * plan.accumulation * plan.microbatch


@pytest.mark.parametrize(
    ("tokens", "ranks", "said"),
    [
        (4096, 3, "64 x microbatch_size 4 x 3 processes = 768; nearest: 3840 or 4608"),
        (100, 1, "64 x microbatch_size 4 x 1 processes = 256; nearest: 256, or"),
        (4095, 1, "nearest: 3840 or 4096"),
    ],
)
def test_batches_that_do_not_divide(tokens: int, ranks: int, said: str) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_tokens = ") as refused:
        BatchPlan.resolve(tokens, sequence_length=64, microbatch=4, batch_ranks=ranks)
    assert said in str(refused.value)


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
