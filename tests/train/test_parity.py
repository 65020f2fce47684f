"""The parity table is green, and turns red for the mistakes that it exists to find."""

from __future__ import annotations

import pytest

from disttrain.config.parallel import ParallelConfig
from disttrain.testing import RankPool
from disttrain.testing.parity import GRADIENT_TOLERANCE, WORLDS, ParityCase, parity_table


@pytest.mark.parametrize("world", WORLDS)
def test_every_layout_trains_as_one_process(pool: RankPool, world: int) -> None:
    rows = list(parity_table(pool, (world,)))
    strategies = {"ddp", "zero1", "zero2", "fsdp sharded", "fsdp unsharded"}
    hsdp = {"hsdp sharded", "hsdp unsharded"} if world >= 4 else set()
    assert {row.strategy for row in rows} == strategies | hsdp
    assert len(rows) == (4 if world == 8 else 8) * len(strategies | hsdp)
    assert [row.contract() for row in rows if not row.passed] == []


@pytest.mark.parametrize("mistake", ["a mean in place of a sum", "a wrong token count", "a dropped rank"])
@pytest.mark.parametrize(
    "case",
    [
        ParityCase(ParallelConfig(strategy="ddp"), 1, "gpt2"),
        ParityCase(ParallelConfig(strategy="zero1"), 3, "gpt2"),
        ParityCase(ParallelConfig(strategy="zero2"), 3, "modern"),
        ParityCase(ParallelConfig(strategy="fsdp"), 3, "modern"),
        ParityCase(ParallelConfig(strategy="hsdp", dp_replicate=2), 3, "gpt2"),
    ],
    ids=lambda case: case.label,
)
def test_a_mistake_turns_the_cell_red(pool: RankPool, case: ParityCase, mistake: str) -> None:
    job = "tests.train.parity_mutations:spoilt_parity"
    gradients, _ = pool.run(job, 4, mistake=mistake, case=case)[0]
    assert gradients > 1e6 * GRADIENT_TOLERANCE
