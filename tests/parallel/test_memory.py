"""Settings that trade computation for memory change neither losses nor gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disttrain.testing import RankPool

JOBS = "tests.parallel.memory_jobs:"


@pytest.fixture(scope="module")
def plain(pool: RankPool) -> dict[str, dict[str, Any]]:
    """Two steps without any saving, per strategy."""
    return {s: pool.run(JOBS + "train", 2, settings={"strategy": s})[0] for s in ("ddp", "zero2", "fsdp")}


def assert_same(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    assert seen["losses"] == expected["losses"]
    for mine, theirs in zip(seen["gradients"], expected["gradients"], strict=True):
        for name, gradient in theirs.items():
            assert torch.equal(mine[name], gradient), name
    for name, parameter in expected["parameters"].items():
        assert torch.equal(seen["parameters"][name], parameter), name


@pytest.mark.parametrize("mode", ["full", "every_n", "selective"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_recomputed_activations_are_bit_equal(
    pool: RankPool, plain: dict[str, dict[str, Any]], strategy: str, mode: str
) -> None:
    settings = {"strategy": strategy, "activation_checkpointing": mode}
    assert_same(pool.run(JOBS + "train", 2, settings=settings)[0], plain[strategy])


def test_each_mode_recomputes_what_it_says(pool: RankPool) -> None:
    attention, mm, silu = "_scaled_dot_product_flash_attention_for_cpu", "mm", "silu"
    counts = {mode: pool.run(JOBS + "operations", 2, mode=mode)[0] for mode in ("none", "full", "every_n", "selective")}
    assert [counts[mode][attention] for mode in counts] == [2, 4, 3, 2]
    assert [counts[mode][silu] for mode in counts] == [2, 4, 3, 4]
    assert counts["selective"][mm] == counts["none"][mm] < counts["every_n"][mm] < counts["full"][mm]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_chunked_loss_differs_only_in_the_order_of_sums(
    pool: RankPool, plain: dict[str, dict[str, Any]], strategy: str
) -> None:
    seen = pool.run(JOBS + "train", 2, settings={"strategy": strategy, "loss_chunk_tokens": 5})[0]
    assert seen["losses"] == pytest.approx(plain[strategy]["losses"], rel=1e-6)
    for name, gradient in plain[strategy]["gradients"][0].items():
        assert (seen["gradients"][0][name] - gradient).abs().max() <= 2e-6 * gradient.abs().max(), name


def test_chunked_loss_never_holds_the_whole_logits(pool: RankPool) -> None:
    whole, chunked = (max(pool.run(JOBS + "largest_logits", 2, chunk=chunk)) for chunk in (0, 21))
    assert (whole, chunked) == (12 * 7, 21)


def test_cpu_offload_is_the_same_run(pool: RankPool, plain: dict[str, dict[str, Any]]) -> None:
    assert_same(pool.run(JOBS + "train", 2, settings={"strategy": "fsdp", "cpu_offload": True})[0], plain["fsdp"])


def test_compiled_blocks_give_the_same_losses(pool: RankPool, plain: dict[str, dict[str, Any]]) -> None:
    settings = {"strategy": "fsdp", "compile": True}
    seen = pool.run(JOBS + "train", 2, timeout_seconds=200, settings=settings)[0]
    assert seen["losses"] == pytest.approx(plain["fsdp"]["losses"], rel=1e-6)
    for name, parameter in plain["fsdp"]["parameters"].items():
        assert (seen["parameters"][name] - parameter).abs().max() <= 1e-5 * parameter.abs().max() + 1e-6, name
