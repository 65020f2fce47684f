"""What ranks have measured, made up: wrong numbers, slow links, slow ranks, silent ranks."""

from __future__ import annotations

from itertools import combinations

import pytest

from disttrain.doctor.check_ranks import check_ranks
from disttrain.doctor.facts import Collective, Rank, Record
from disttrain.doctor.pairing import link_rounds, tournament
from tests.doctor.made_up import measured, only

HOSTS = ["a", "b", "c"]


def seen(ranks: tuple[Rank, ...], **changed: object) -> Record:
    return Record(here="a", ranks=ranks, **changed)  # type: ignore[arg-type]


def changed(rank: int, **facts: object) -> tuple[Rank, ...]:
    return tuple(each.model_copy(update=facts) if each.rank == rank else each for each in measured(HOSTS))


def test_ranks_that_are_well() -> None:
    findings = check_ranks(seen(measured(HOSTS)))
    assert [(finding.severity, finding.check) for finding in findings] == [
        ("ok", "collectives"),
        ("ok", "links"),
        ("ok", "speed"),
    ]


def test_a_rank_that_sends_wrong_numbers() -> None:
    wrong = Collective(name="all_gather", elements=9, wrong_elements=3, max_error=2.0, wrong_from=(1,))
    ranks = tuple(rank.model_copy(update={"collectives": (wrong,)}) for rank in measured(HOSTS))
    found = only(check_ranks(seen(ranks)))
    assert "9 elements, off by up to 2; rank 1 on b is to blame" in found.what
    assert found.where == ("b",)


def test_a_rank_that_alone_ends_up_with_wrong_sums() -> None:
    wrong = Collective(name="all_reduce", elements=9, wrong_elements=1, max_error=0.5)
    found = only(check_ranks(seen(changed(2, collectives=(wrong,)))))
    assert found.where == ("c",)


def test_numbers_that_change_on_a_link() -> None:
    damaged = measured(HOSTS)[1].links[0].model_copy(update={"wrong_elements": 7})
    found = only(check_ranks(seen(changed(1, links=(damaged,)))))
    assert "send and receive: 7 elements" in found.what


def test_one_slow_link_is_named() -> None:
    found = only(check_ranks(seen(measured(HOSTS, {(0, 2): 3e8}))), "warning")
    assert "rank 0 (a) to rank 2 (c) 300 MB/s" in found.what
    assert "0.30 x the usual 1.00 GB/s" in found.what
    assert found.where == ("a", "c")


def test_slow_links_of_one_node() -> None:
    found = only(check_ranks(seen(measured(HOSTS, {(2, 0): 3e8, (2, 1): 3e8}))), "warning")
    assert "2 of 6 links are slow, all at c" in found.what
    assert found.where == ("c",)


def test_all_links_are_slower_than_gigabit_ethernet() -> None:
    every = {(a, b): 5e7 for a in range(3) for b in range(3)}
    assert "6 of 6 links are slow" in only(check_ranks(seen(measured(HOSTS, every))), "warning").what


def test_one_link_of_one_machine_has_nothing_to_compare_it_with() -> None:
    assert {f.severity for f in check_ranks(seen(measured(["a", "a"], {(0, 1): 1e8})))} == {"ok"}


def test_the_slowest_rank_is_named() -> None:
    found = only(check_ranks(seen(changed(1, compute_seconds=0.03, compute_cpu_share=0.4))), "warning")
    assert "rank 1 on b is slow: 30.0 ms, 3.0 x the usual 10.0 ms; it had 40 % of a core" in found.what


def test_of_two_ranks_the_faster_is_the_usual_one() -> None:
    pair = measured(["a", "b"])
    slow = (pair[0], pair[1].model_copy(update={"compute_seconds": 0.02}))
    assert only(check_ranks(seen(slow)), "warning").where == ("b",)


def test_a_silent_rank_and_those_that_waited_for_it() -> None:
    ranks = changed(0, failed="in all_reduce: Timed out waiting 20000ms")[:2]
    findings = check_ranks(seen(ranks, missing_ranks={2: "c: in all_reduce", 3: ""}))
    said = [finding.what for finding in findings if finding.severity == "breaks"]
    assert said == [
        "rank 2 gave no result: c: in all_reduce",
        "rank 3 gave no result: it never came",
        "rank 0 failed in all_reduce: Timed out waiting 20000ms",
    ]
    assert findings[0].where == ("c",)


def test_ranks_that_were_not_asked() -> None:
    (finding,) = check_ranks(Record(here="a", not_measured="nodes are missing"))
    assert (finding.severity, finding.what) == ("note", "no figures from the ranks: nodes are missing")


@pytest.mark.parametrize("count", range(1, 10))
def test_everybody_meets_everybody_once(count: int) -> None:
    ranks = range(10, 10 + count)
    rounds = tournament(ranks)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(ranks, 2))
    for pairs in rounds:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)


def test_rounds_of_nodes() -> None:
    """Two nodes of two: inside both at once, then between their first ranks."""
    assert link_rounds(4, 2) == [[(0, 1), (2, 3)], [(0, 2)]]
    assert link_rounds(3, 1) == tournament([0, 1, 2])
    assert len(tournament(range(1000))) == 16
