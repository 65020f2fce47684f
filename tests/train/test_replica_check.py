"""One flipped bit in one copy of a weight ends a run with the rank's name, before a checkpoint could hold it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from disttrain.testing import RankPool
from disttrain.testing.bad_numbers import Fault
from tests.train.test_bad_numbers import events, lines, trained

EVERY_FIVE = ("resilience.compare_replicas_every=5",)


@pytest.mark.parametrize(
    ("strategy", "world", "where", "said"),
    [
        ("ddp", 3, "parameter", r"rank 1 on \S+: wte\.weight.* not as on the other ranks"),
        ("ddp", 2, "parameter", r"rank 0 on \S+, rank 1 on \S+: wte\.weight.* no majority tells"),
        ("zero1", 3, "gathered", r"rank 1 on \S+: blocks\.0\.\S+ not as on"),
        ("zero2", 3, "gathered", r"rank 1 on \S+: blocks\.0\.\S+ not as on"),
        ("hsdp", 4, "parameter", r"rank 1 on \S+, rank 3 on \S+: wte\.weight.* no majority"),
    ],
)
def test_a_flipped_bit(
    pool: RankPool, config: Path, tmp_path: Path, strategy: str, world: int, where: Any, said: str
) -> None:
    """In step 12 on rank 1; copies that live within a step are looked at in that step, others after it."""
    step = 15 if where == "gathered" else 12
    settings = (
        *EVERY_FIVE,
        f"parallel.strategy={strategy}",
        "train.microbatch_size=1",
        "train.global_batch_tokens=384",
    )
    if strategy == "hsdp":
        settings = (*settings[:-1], "parallel.dp_replicate=2")
    ended = trained(pool, config, tmp_path, Fault(step, 1, where, "flip"), world=world, settings=settings)
    assert ended == [ended[0]] * world
    state, (problem,) = ended[0]
    assert state == "failed"
    assert re.match(f"step 15: weights that should be equal are not. {said}", problem), problem
    assert ("before which all copies were compared" in problem) == (where == "parameter")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    assert problem in events(tmp_path, "failed")[0]["text"]


def test_nothing_is_saved_that_was_not_compared(pool: RankPool, config: Path, tmp_path: Path) -> None:
    """Between two comparisons a checkpoint is due."""
    settings = ("resilience.compare_replicas_every=1000", "parallel.strategy=ddp")
    state, (problem,) = trained(pool, config, tmp_path, Fault(12, 1, "parameter", "flip"), settings=settings)[0]
    assert (state, problem[:9]) == ("failed", "step 20: ")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
def test_sound_copies_say_nothing(pool: RankPool, config: Path, tmp_path: Path, strategy: str) -> None:
    settings = (*EVERY_FIVE, f"parallel.strategy={strategy}", "train.steps=20")
    assert trained(pool, config, tmp_path, settings=settings) == [("completed", [])] * 2
    seconds = [row["comparison_seconds"] for row in lines(tmp_path, "metrics.jsonl") if "comparison_seconds" in row]
    assert any(seconds) == (strategy == "ddp")


def test_off(pool: RankPool, config: Path, tmp_path: Path) -> None:
    settings = ("resilience.compare_replicas_every=0", "parallel.strategy=ddp")
    assert trained(pool, config, tmp_path, Fault(12, 1, "parameter", "flip"), settings=settings)[0][0] == "completed"
