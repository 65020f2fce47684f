"""The roll call before torchrun: nodes say to the head that they are there, and who is missing is told. No torch here.

torchrun itself waits ten minutes for its nodes and then names nobody. The head listens where its torchrun will listen a
moment later, and greets whoever calls; torchrun greets nobody, which tells a node that comes late that the job is on.
"""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

from disttrain.errors import LaunchError
from disttrain.launching.network import wait_for_head

TELL_SECONDS = 30.0
"""After which, and how often from then on, the missing nodes are told of."""
LAST_CALL_SECONDS = 5.0
"""How long the head stays for more nodes, once as many are here as an elastic job needs."""
GREET_SECONDS = 3.0
_GREETING, _GO = "disttrain: who is there?", "go"
_SAY, _FAIL = "say ", "fail "
_NAME = re.compile(r"(\d*) ([\w.-]{1,255})")
_LONGEST = 4096
_NAMED = 8
_PAUSE_SECONDS = 0.5
Say = Callable[[str], None]


class Nodes(NamedTuple):
    """How many the job needs, and how many it has a place for."""

    least: int
    most: int


@dataclass(frozen=True)
class Member:
    """A node that has come."""

    host: str
    index: int | None
    """Its number, where a scheduler has given it one."""

    def line(self) -> str:
        return f"{'' if self.index is None else self.index} {self.host}"


def read_member(line: str) -> Member | None:
    """None for the words of somebody else."""
    found = _NAME.fullmatch(line)
    return Member(found[2], int(found[1]) if found[1] else None) if found else None


def who_is_missing(here: Iterable[Member], nodes: int, seconds: float) -> str:
    """In words: by their numbers where all that came have one, else how many."""
    came = sorted(here, key=lambda member: (member.index or 0, member.host))
    names = ", ".join(member.host for member in came[:_NAMED]) + (", ..." if len(came) > _NAMED else "")
    absent = sorted(set(range(nodes)) - {member.index for member in came})
    numbered = len(absent) == nodes - len(came) and all(member.index is not None for member in came)
    one = nodes - len(came) == 1
    listed = ", ".join(map(str, absent[:_NAMED])) + (", ..." if len(absent) > _NAMED else "")
    who = f"{'node' if one else 'nodes'} {listed}" if numbered else f"{nodes - len(came)} of {nodes} nodes"
    return f"{who} {'has' if one else 'have'} not come after {seconds:.0f} s; here {_is_are(len(came))} {names}"


def call_roll(server: socket.socket, nodes: Nodes, own: Member, wait_seconds: float, say: Say) -> None:
    """On the head: stay until all nodes, this one too, are here at once, and send them on. Closes `server`.

    Raises LaunchError with the missing ones, on all nodes that came, when `wait_seconds` are over.
    """
    began, told = time.monotonic(), 0.0
    enough_since = began
    with _Roll(server, own) as roll:
        while (count := len(roll.here())) < nodes.most:
            roll.listen(_PAUSE_SECONDS)
            now = time.monotonic()
            if count >= nodes.least:
                if now - enough_since >= LAST_CALL_SECONDS:
                    break
                continue
            enough_since, waited = now, now - began
            if waited >= wait_seconds:
                what = f"{who_is_missing(roll.here(), nodes.least, waited)}: start them too, or look at their logs"
                roll.tell(_FAIL + what)
                raise LaunchError(what)
            if waited - told >= TELL_SECONDS:
                told = waited
                what = f"{who_is_missing(roll.here(), nodes.least, waited)}; waiting until {wait_seconds:.0f} s"
                roll.tell(_SAY + what)
                say(what)
        # Before anybody may go: who calls from now on must not find us in place of torchrun.
        server.close()
        roll.tell(_GO)


def join_roll(address: str, port: int, own: Member, reach_seconds: float, wait_seconds: float, say: Say) -> None:
    """On any other node: say that it is here, and return when torchrun listens on the head.

    Raises LaunchError as `wait_for_head` does, and with the missing nodes when the head gives up on them.
    """
    end = time.monotonic() + reach_seconds + wait_seconds
    while True:
        wait_for_head(address, port, reach_seconds, wait_seconds, say)
        came_to = _answer(address, port, own, say)
        if came_to == "go":
            wait_for_head(address, port, reach_seconds, wait_seconds, lambda text: None)
        if came_to != "gone":
            return
        if time.monotonic() >= end:
            raise LaunchError(f"the head {address}:{port} hangs up on {own.host} again and again: look at its log")
        time.sleep(_PAUSE_SECONDS)


def _answer(address: str, port: int, own: Member, say: Say) -> Literal["go", "gone", "torchrun"]:
    """`gone`: the head left before it had sent anybody on."""
    with (
        suppress(OSError),
        socket.create_connection((address, port), timeout=GREET_SECONDS) as head,
        head.makefile(encoding="utf-8", errors="replace") as lines,
    ):
        try:
            greeting = lines.readline(_LONGEST).strip()
        except TimeoutError:
            return "torchrun"
        if greeting and greeting != _GREETING:
            raise LaunchError(f"what listens at {address}:{port} is no job of ours, but says {greeting[:40]!r}")
        head.sendall(f"{own.line()}\n".encode())
        head.settimeout(None)
        for line in lines:
            if line.startswith(_FAIL):
                raise LaunchError(line.removeprefix(_FAIL).strip())
            if line.strip() == _GO:
                return "go"
            say(line.removeprefix(_SAY).strip())
    return "gone"


class _Roll:
    """The connections of nodes that have come and wait, at a socket that listens."""

    def __init__(self, server: socket.socket, own: Member) -> None:
        self._server, self._own = server, own
        self._callers: dict[socket.socket, tuple[str, Member | None]] = {}
        """What each has said until now, and who it is once that is known."""
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> _Roll:
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        return self

    def __exit__(self, *error: object) -> None:
        self._selector.close()
        for caller in self._callers:
            caller.close()
        self._server.close()

    def here(self) -> list[Member]:
        return [self._own, *(member for _, member in self._callers.values() if member is not None)]

    def listen(self, seconds: float) -> None:
        """Take in who calls and who says its name, let go who hung up, until `seconds` are over or something came."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                with suppress(OSError):
                    caller, _ = self._server.accept()
                    caller.setblocking(False)
                    self._selector.register(caller, selectors.EVENT_READ)
                    self._callers[caller] = ("", None)
                    self._send(caller, _GREETING)
            else:
                self._hear(key.fileobj)  # type: ignore[arg-type]

    def tell(self, line: str) -> None:
        for caller, (_, member) in list(self._callers.items()):
            if member is not None:
                self._send(caller, line)

    def _hear(self, caller: socket.socket) -> None:
        said, member = self._callers[caller]
        try:
            part = caller.recv(_LONGEST)
        except OSError:
            part = b""
        line, ended, _ = (said + part.decode(errors="replace")).partition("\n")
        member = member or (read_member(line) if ended else None)
        if not part or (member is None and (ended or len(line) > _LONGEST)):
            self._let_go(caller)
        else:
            self._callers[caller] = (line, member)

    def _send(self, caller: socket.socket, line: str) -> None:
        try:
            caller.sendall(f"{line}\n".encode())
        except OSError:
            self._let_go(caller)

    def _let_go(self, caller: socket.socket) -> None:
        self._selector.unregister(caller)
        del self._callers[caller]
        caller.close()


def _is_are(count: int) -> str:
    return "is" if count == 1 else "are"
