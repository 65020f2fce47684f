"""The roll call before torchrun: on loopback, with threads for nodes; each way in which it may go wrong once."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import pytest

from disttrain.errors import LaunchError
from disttrain.launching import roll_call
from disttrain.launching.roll_call import Member, Nodes, call_roll, join_roll, read_member, who_is_missing
from tests.cli.helpers import environment, run, started

HEAD = Member("n0", 0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "GREET_SECONDS", 0.5)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def joined(pool: ThreadPoolExecutor, port: int, member: Member, say: Callable[[str], None] = print) -> Future[None]:
    return pool.submit(join_roll, "127.0.0.1", port, member, 30, 30, say)


def timeless(text: str) -> str:
    """How long it took depends on the machine."""
    return re.sub(r"\b\d+ s\b", "N s", text)


def torchrun_listens(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def test_all_are_sent_on_when_the_last_has_come(server: socket.socket, pool: ThreadPoolExecutor) -> None:
    """They leave when torchrun listens, at the same port, which is free for it."""
    port = port_of(server)
    others = [joined(pool, port, Member(f"n{index}", index)) for index in (1, 2)]
    call_roll(server, Nodes(3, 3), HEAD, 30, print)
    time.sleep(0.1)
    assert not any(other.done() for other in others)
    with torchrun_listens(port):
        assert [other.result(timeout=30) for other in others] == [None, None]


def test_who_does_not_come_is_told_and_named_on_every_node(
    server: socket.socket, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_call, "TELL_SECONDS", 0.6)
    said: list[str] = []
    other = joined(pool, port_of(server), Member("n2", 2), said.append)
    with pytest.raises(LaunchError) as caught:
        call_roll(server, Nodes(3, 3), HEAD, 1.5, said.append)
    told = "node 1 has not come after N s; here are n0, n2; waiting until N s"
    assert [timeless(line) for line in said[:2]] == [told, told]
    in_the_end = "node 1 has not come after N s; here are n0, n2: start them too, or look at their logs"
    assert timeless(str(caught.value)) == in_the_end
    assert str(other.exception(timeout=30)) == str(caught.value)


def test_an_elastic_job_waits_a_moment_for_more(
    server: socket.socket, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all it begins at once, with enough of them after the last call."""
    port = port_of(server)
    other = joined(pool, port, Member("n1", 1))
    call_roll(server, Nodes(1, 2), HEAD, 30, print)
    with torchrun_listens(port):
        assert other.result(timeout=30) is None
    monkeypatch.setattr(roll_call, "LAST_CALL_SECONDS", 0.2)
    call_roll(socket.create_server(("127.0.0.1", port)), Nodes(1, 2), HEAD, 0.0, print)


def test_a_node_that_hangs_up_is_not_here(server: socket.socket) -> None:
    """Its process was killed while it waited."""
    with socket.create_connection(server.getsockname()) as gone:
        gone.sendall(b"1 n1\n")
        threading.Timer(0.4, gone.shutdown, [socket.SHUT_RDWR]).start()
        with pytest.raises(LaunchError, match=r"nodes 1, 2 have not come after \d+ s; here is n0"):
            call_roll(server, Nodes(3, 3), HEAD, 1.2, print)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000, b"\xff\n", b""])
def test_strangers_are_nobody(server: socket.socket, words: bytes) -> None:
    with socket.create_connection(server.getsockname()) as stranger:
        stranger.sendall(words)
        with pytest.raises(LaunchError, match="here is n0"):
            call_roll(server, Nodes(2, 2), HEAD, 0.6, print)


def test_a_node_that_comes_late_finds_torchrun(server: socket.socket, pool: ThreadPoolExecutor) -> None:
    """Which says nothing to whoever calls."""
    assert joined(pool, port_of(server), Member("n1", 1)).result(timeout=30) is None


def test_somebody_elses_server(server: socket.socket, pool: ThreadPoolExecutor) -> None:
    late = joined(pool, port_of(server), Member("n1", 1))
    for _ in range(2):  # the first call only looks whether anybody listens
        with server.accept()[0] as caller, closing(caller):
            caller.sendall(b"SSH-2.0-OpenSSH\r\n")
    with pytest.raises(LaunchError, match="is no job of ours, but says 'SSH-2"):
        late.result(timeout=30)


def test_a_head_that_is_started_again(server: socket.socket, pool: ThreadPoolExecutor) -> None:
    """Its first process was killed after it had greeted: nodes wait for the second one."""
    port = port_of(server)
    other = joined(pool, port, Member("n1", 1))
    for _ in range(2):
        caller, _ = server.accept()
        caller.sendall(b"disttrain: who is there?\n")
        caller.close()
    server.close()
    call_roll(socket.create_server(("127.0.0.1", port)), Nodes(2, 2), HEAD, 30, print)
    with torchrun_listens(port):
        assert other.result(timeout=30) is None


@pytest.mark.parametrize(
    ("here", "nodes", "said"),
    [
        ([HEAD], 4, "nodes 1, 2, 3 have not come after 30 s; here is n0"),
        ([Member("a", None)], 2, "1 of 2 nodes has not come after 30 s; here is a"),
        ([HEAD, Member("n7", 7)], 3, "1 of 3 nodes has not come after 30 s; here are n0, n7"),  # two of four to eight
        ([HEAD], 20, "nodes 1, 2, 3, 4, 5, 6, 7, 8, ... have not come after 30 s; here is n0"),
    ],
)
def test_the_missing_in_words(here: list[Member], nodes: int, said: str) -> None:
    assert who_is_missing(here, nodes, 30) == said


def test_members_are_read_as_they_are_written() -> None:
    for member in (HEAD, Member("gpu-07.cluster", None)):
        assert read_member(member.line()) == member
    assert read_member("1 n1; rm") is None


def test_two_jobs_on_one_head_at_once() -> None:
    """The first one has not begun to listen, as torchrun does only seconds after its start; it has the port all the
    same, and leaves it with its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = (sys.executable, "-m", "disttrain.launching.node", "--head", "127.0.0.1", "--port", port, "--")
    with started(
        *start, sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)", env=environment()
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "1\n"
        second = run(*start, "true")
        assert second.code == 2
        assert second.err.startswith(f"error: port {port} on the head {socket.gethostname()} (127.0.0.1) is in use")
    assert run(*start, "true").code == 0


def test_a_node_waits_for_the_others_before_its_command() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = (sys.executable, "-m", "disttrain.launching.node", "--head", "127.0.0.1", "--port", port, "--nodes", 2)
    ended = run(*start, "--wait", 1, "--", "echo", "begun")
    assert (ended.code, ended.out) == (1, "")
    said = f"error: 1 of 2 nodes has not come after N s; here is {socket.gethostname()}: "
    assert timeless(ended.err).startswith(said)
    # Torchrun's part is played by a server of the same port.
    serve = "import socket, sys; s = socket.create_server(('', int(sys.argv[1]))); print('head'); s.accept()"
    env = environment(RANK="1")
    with (
        started(*start, "--", sys.executable, "-c", serve, port) as head,
        started(*start, "--", "true", env=env) as node,
    ):
        assert (node.wait(timeout=30), head.wait(timeout=30)) == (0, 0)
