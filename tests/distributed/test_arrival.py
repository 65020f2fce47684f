"""Ranks that do not come are named; a port that another job has is told in words."""

from __future__ import annotations

import socket
import threading

import pytest
import torch.distributed as dist

from disttrain.distributed.arrival import meet
from disttrain.distributed.env import Ranks
from disttrain.errors import LaunchError, UserError


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return number


def in_threads(ranks: list[Ranks], timeout_seconds: float) -> dict[int, dist.Store | Exception]:
    """What each rank comes to; threads stand for processes here."""
    ended: dict[int, dist.Store | Exception] = {}

    def one(who: Ranks) -> None:
        try:
            ended[who.rank] = meet(who, timeout_seconds)
        except Exception as error:
            ended[who.rank] = error

    threads = [threading.Thread(target=one, args=(who,)) for who in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def on_nodes(*present: int, world: int, local_world: int) -> list[Ranks]:
    return [Ranks(rank, world, rank % local_world, local_world) for rank in present]


def test_all_come(port: int) -> None:
    ended = in_threads(on_nodes(0, 1, 2, 3, world=4, local_world=2), timeout_seconds=30)
    assert all(isinstance(store, dist.Store) for store in ended.values()), ended


def test_who_is_missing_is_named_with_its_host_or_node(port: int) -> None:
    """Rank 1 shares a node with rank 0; nobody of node 2 has come."""
    ended = in_threads(on_nodes(0, 2, 3, world=6, local_world=2), timeout_seconds=1)
    assert {type(error) for error in ended.values()} == {LaunchError}
    said = str(ended[0])
    assert said.startswith(f"ranks 1 ({socket.gethostname()}), 4 (node 2), 5 (node 2) of 6 have not arrived after 1 s")
    assert "resilience.arrival_timeout_seconds allows more time" in said


def test_the_first_rank_is_missing(port: int) -> None:
    ended = in_threads(on_nodes(1, world=2, local_world=1), timeout_seconds=1)
    said = str(ended[1])
    assert said.startswith(f"rank 0 of 2 has not arrived: nobody listens at 127.0.0.1:{port} after 1 s")


def test_many_missing_are_counted(port: int) -> None:
    ended = in_threads(on_nodes(0, world=64, local_world=8), timeout_seconds=1)
    assert "7 (" in str(ended[0])
    assert "8 (node 1) and 55 more of 64 have not arrived" in str(ended[0])


def test_a_port_that_another_job_has(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UserError) as caught:
        meet(Ranks(0, 2, 0, 2), timeout_seconds=5)
    assert str(caught.value).startswith(f"rank 0 cannot listen at 127.0.0.1:{port}: the port is in use")
    assert not isinstance(caught.value, LaunchError)


def test_what_an_earlier_start_left_in_an_agents_store_is_not_found(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's store outlives its ranks: those of a second start wait for each other, not for the dead."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    both = on_nodes(0, 1, world=2, local_world=2)
    assert all(isinstance(store, dist.Store) for store in in_threads(both, timeout_seconds=30).values())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    alone = in_threads(both[:1], timeout_seconds=1)
    assert str(alone[0]).startswith(f"rank 1 ({socket.gethostname()}) of 2 has not arrived")
    assert all(isinstance(store, dist.Store) for store in in_threads(both, timeout_seconds=30).values())
    del agent
