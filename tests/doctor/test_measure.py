"""What ranks measure with real collectives on gloo: well, with numbers changed, with slow and silent ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.doctor.check_ranks import check_ranks
from disttrain.doctor.facts import Rank, Record
from disttrain.doctor.measure import COLLECTIVES
from disttrain.testing import RankPool
from tests.doctor.made_up import only

JOBS = "tests.doctor.jobs"


def seen(**facts: list[object]) -> Record:
    """A record of ranks, each on a host of its own, from the results of a job."""
    (name, results), *_ = facts.items()
    ranks = [Rank(rank=rank, host=f"h{rank}", backend="gloo", **{name: result}) for rank, result in enumerate(results)]
    return Record(here="h0", ranks=tuple(ranks))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_right_results(pool: RankPool, world: int) -> None:
    for found in pool.run(f"{JOBS}:collectives", world):
        assert [each.name for each in found] == list(COLLECTIVES)
        assert all((each.wrong_elements, each.max_error, each.wrong_from) == (0, 0.0, ()) for each in found)
        assert all(each.elements for each in found)
        assert (found[0].bus_bytes_per_second is not None) == (world > 1)


def test_one_wrong_number_of_a_sum(pool: RankPool) -> None:
    found = pool.run(f"{JOBS}:collectives", 3, corrupt=1)
    assert [sum(each.wrong_elements for each in of_rank) for of_rank in found] == [0, 1, 0]
    assert only(check_ranks(seen(collectives=found))).where == ("h1",)


def test_a_rank_that_sends_wrong_numbers(pool: RankPool) -> None:
    found = pool.run(f"{JOBS}:collectives", 3, corrupt=2, sends=True)
    assert {each.wrong_from for of_rank in found for each in of_rank if each.wrong_elements} == {(2,)}
    finding = only(check_ranks(seen(collectives=found)))
    assert finding.where == ("h2",)
    assert "all_gather, all_to_all" in finding.what
    assert finding.figures["max_error"] == 1.0


def test_every_link_both_ways(pool: RankPool) -> None:
    found = pool.run(f"{JOBS}:links", 3, local_world=1)
    assert sorted((link.sender, link.receiver) for of_rank in found for link in of_rank) == [
        (sender, receiver) for sender in range(3) for receiver in range(3) if sender != receiver
    ]
    for link in (link for of_rank in found for link in of_rank):
        assert link.wrong_elements == 0
        assert link.bytes_per_second > 0
        assert link.latency_seconds > 0


def test_a_link_that_changes_numbers(pool: RankPool) -> None:
    found = pool.run(f"{JOBS}:links", 3, local_world=3, corrupt=1)
    wrong = {(link.sender, link.receiver) for of_rank in found for link in of_rank if link.wrong_elements}
    assert wrong == {(1, 0), (1, 2)}
    assert only(check_ranks(seen(links=found))).where == ("h1",)


def test_a_rank_that_is_busy_otherwise(pool: RankPool) -> None:
    """Nine times its own time is lost in a loop: a ratio that no busy machine makes up for on the other rank."""
    times = pool.run(f"{JOBS}:computation", 2, slow=1)
    record = seen(compute_seconds=[seconds for seconds, _ in times])
    assert only(check_ranks(record), "warning").where == ("h1",)


def test_nobody_waits_for_a_silent_rank(pool: RankPool, tmp_path: Path) -> None:
    """Rank 2 stands still in all_reduce, rank 3 never came."""
    results, missing = pool.run(f"{JOBS}:silent_rank", 3, path=str(tmp_path / "store"))[0]
    assert results == [0, 1]
    assert missing == {2: "host-2: in all_reduce", 3: ""}
