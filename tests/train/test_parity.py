"""The parity table is green, and turns red for the mistakes that it exists to find."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from disttrain.testing import RankPool
from disttrain.testing.parity import GRADIENT_TOLERANCE, WORLDS, ParityCase, parity_table


@pytest.mark.parametrize("world", WORLDS)
def test_every_layout_trains_as_one_process(pool: RankPool, world: int) -> None:
    rows = list(parity_table(pool, (world,)))
    assert len(rows) == 24
    assert {row.strategy for row in rows} == {"ddp", "fsdp (sharded)", "fsdp (unsharded)"}
    assert [row.contract() for row in rows if not row.passed] == []


@pytest.mark.parametrize("mistake", ["a mean in place of a sum", "a wrong token count", "a dropped rank"])
@pytest.mark.parametrize(
    "case",
    [
        ParityCase("ddp", "unsharded", 1, "gpt2"),
        ParityCase("fsdp", "sharded", 3, "modern"),
        ParityCase("fsdp", "unsharded", 3, "gpt2"),
    ],
    ids=lambda case: case.label,
)
def test_a_mistake_turns_the_cell_red(pool: RankPool, case: ParityCase, mistake: str) -> None:
    job = "tests.train.parity_mutations:spoilt_parity"
    gradients, _ = pool.run(job, 2, mistake=mistake, case=asdict(case))[0]
    assert gradients > 1e6 * GRADIENT_TOLERANCE
