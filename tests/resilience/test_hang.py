"""Who is to blame, from what ranks wrote down."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from disttrain.resilience.hang import Whereabouts, accuse, last_collective, lost_peers, read_whereabouts
from disttrain.resilience.restarts import RestartBudget

ONE = Whereabouts(
    0, "box", 100, 7, "a step", 31.0, (50, "gloo:all_reduce"), ["outer", 'File "a.py", line 3\n  wait()\n']
)


def ranks(*collectives: tuple[int, str] | None) -> dict[int, Whereabouts]:
    return {rank: replace(ONE, rank=rank, process=100 + rank, collective=one) for rank, one in enumerate(collectives)}


def test_a_rank_that_says_nothing() -> None:
    found = ranks((50, "gloo:all_reduce"), (50, "gloo:all_reduce"))
    assert accuse(found, 2).endswith(
        "all ranks are in the same collective, gloo:all_reduce: the network, or a rank's thread of it"
    )
    assert "no progress in step 7 for 31 s: rank 2 of 3 does not answer at all" in accuse(found, 3)
    assert "ranks 2, 3 of 4 do not answer" in accuse(found, 4)


def test_a_rank_that_is_behind() -> None:
    found = ranks((50, "gloo:all_reduce"), (48, "gloo:all_gather"), (49, "gloo:all_reduce"))
    text = accuse(found, 3)
    assert "rank 1 on box (process 101) has entered 48 collectives, the others 50" in text
    assert text.endswith('it is in File "a.py", line 3 wait()')


def test_a_rank_in_another_collective() -> None:
    found = ranks((50, "gloo:all_reduce"), (50, "gloo:all_reduce"), (50, "gloo:broadcast"))
    assert "rank 2 on box in gloo:broadcast, others in gloo:all_reduce" in accuse(found, 3)


def test_ranks_in_two_collectives_without_a_majority() -> None:
    """Nobody can say which is right: both are told, whatever the names sort like."""
    text = accuse(ranks((50, "gloo:all_reduce"), (50, "gloo:all_gather")), 2)
    assert text.endswith(
        "ranks are in different collectives, none in that of a majority: rank 0 on box in gloo:all_reduce; "
        "rank 1 on box in gloo:all_gather"
    )


def test_without_a_record_places_are_told() -> None:
    assert "nobody is behind as far as can be seen; rank 0 in File" in accuse(ranks(None, (3, "x")), 2)


def test_the_last_collective_of_a_flight_record() -> None:
    entries = [
        {"collective_seq_id": 1, "time_created_ns": 5, "profiling_name": "gloo:all_reduce"},
        {"collective_seq_id": 3, "time_created_ns": 9, "profiling_name": "gloo:all_gather"},
        {"collective_seq_id": 2, "time_created_ns": 7, "profiling_name": "gloo:all_reduce"},
    ]
    assert last_collective({"entries": entries}) == (3, "gloo:all_gather")
    assert last_collective({}) is None


def test_collectives_of_all_groups_count_where_each_group_has_its_own_numbers() -> None:
    """Under hsdp a rank that slept was ahead of others by the number of its last one alone."""
    world = {"collective_seq_id": 9, "time_created_ns": 5, "profiling_name": "gloo:all_reduce", "process_group": ["0"]}
    shards = {"collective_seq_id": 4, "time_created_ns": 8, "profiling_name": "gloo:broadcast", "process_group": ["1"]}
    assert last_collective({"entries": [world, shards]}) == (13, "gloo:broadcast")


def test_files_that_are_torn_are_no_account(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").write_text(json.dumps(vars(ONE)))
    (tmp_path / "rank-1.json").write_text('{"rank": 1')
    (tmp_path / "rank-2.json").write_text("{}")
    assert read_whereabouts(tmp_path) == {0: ONE}
    assert read_whereabouts(tmp_path, since=time.time() + 60) == {}


@pytest.mark.parametrize(
    "text", ["Connection closed by peer [1.2.3.4]:5", "Connection reset by peer", "ncclRemoteError: x"]
)
def test_peers_that_are_gone(text: str) -> None:
    assert lost_peers(RuntimeError(text))
    assert not lost_peers(ValueError("shapes differ"))
    assert not lost_peers(None)


def test_a_run_that_gets_on_may_be_started_again_for_ever() -> None:
    budget = RestartBudget(2, [])
    assert [budget.allows([]), budget.allows([]), budget.allows([])] == [True, True, False]
    budget = RestartBudget(1, [Path("a")])
    assert all(budget.allows([Path(str(step)), Path("a")]) for step in range(50))
    assert not budget.allows([Path("49"), Path("a")])
    assert not RestartBudget(0, []).allows([])
