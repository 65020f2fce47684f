"""How this node sees the head: its route, the interface of that route, and whether anybody answers. No torch here."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from disttrain.distributed.network import (
    ELSEWHERE,
    interface_addresses,
    interface_of,
    named_interfaces,
    source_address,
)
from disttrain.errors import LaunchError, UserError

_TRY_SECONDS = 5.0
_PAUSE_SECONDS = 0.5
_NOBODY_LISTENS = (errno.ECONNREFUSED, errno.ECONNRESET)


@dataclass(frozen=True)
class Route:
    """Our end of the way to another machine."""

    address: str
    interface: str


def resolve(host: str, seconds: float) -> str:
    """The address of `host`; a name may come up late, so it is asked for `seconds` long. Raises LaunchError."""
    end = time.monotonic() + seconds
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            if time.monotonic() >= end:
                raise LaunchError(
                    f"the head {host!r} has no address on {socket.gethostname()} ({error}) after {seconds:.0f} s: give "
                    "its IP address, or mend DNS or /etc/hosts on this node"
                ) from None
        time.sleep(_PAUSE_SECONDS)


def route_to(address: str) -> Route:
    """What `ip route get ADDRESS` says, asked of the kernel itself: no packet is sent. Raises LaunchError."""
    known = interface_addresses()
    try:
        own = source_address(address)
    except OSError as error:
        raise LaunchError(
            f"{socket.gethostname()} has no route to {address} ({error.strerror}): its interfaces are {_listed(known)}"
        ) from None
    return Route(own, interface_of(own, known) or "")


def way_out(head: str, address: str) -> Route:
    """Our end of the way to the head; where this machine's own name is a loopback address (Debian's 127.0.1.1), which
    nobody else can reach, the end of the default route."""
    route = route_to(address)
    if not address.startswith("127.") or head == address:
        return route
    try:
        outside = route_to(ELSEWHERE)
    except LaunchError:
        return route
    return outside if outside.interface else route


def check_interface(variable: str, value: str) -> Route:
    """The interfaces that somebody chose, of which the first one is returned; UserError with those that there are."""
    known = interface_addresses()
    found = named_interfaces(variable, value, list(known))
    absent = [] if variable.startswith("NCCL") else [name for name in value.split(",") if name.strip() not in known]
    usable = [name for name in found if known[name]]
    if absent or not usable:
        what = f"{found[0]} has no address" if found and not absent else f"{(absent or [value])[0]} is not there"
        raise UserError(
            f"{variable} = {value}: on {socket.gethostname()} the interface {what}; there are {_listed(known)}. Leave "
            "it out to take the one on the route to the head"
        )
    return Route(known[usable[0]][0], usable[0])


def somebody_listens(address: str, port: int) -> bool:
    """Whether a connection is accepted. Raises OSError where the machine does not answer at all."""
    try:
        with socket.create_connection((address, port), timeout=_TRY_SECONDS):
            return True
    except OSError as error:
        if error.errno in _NOBODY_LISTENS:
            return False
        raise


def wait_for_head(
    address: str, port: int, reach_seconds: float, wait_seconds: float, say: Callable[[str], None] = print
) -> None:
    """Return when the head accepts connections, or, with `wait_seconds` 0, when its machine answers.

    Raises LaunchError when the machine does not answer within `reach_seconds`, or nobody listens after `wait_seconds`.
    """
    began, answered, told = time.monotonic(), False, False
    why = ""
    while True:
        waited = time.monotonic() - began
        try:
            if somebody_listens(address, port) or not wait_seconds:
                return
            answered = True
        except OSError as error:
            why = error.strerror or str(error)
        if not answered and waited >= reach_seconds - _TRY_SECONDS:
            raise LaunchError(
                f"the head {address}:{port} cannot be reached from {socket.gethostname()} ({why}, tried for "
                f"{time.monotonic() - began:.0f} s): see that it runs, that this is its address, and that no firewall "
                f"is between; `ip route get {address}` shows the way"
            )
        if answered and waited >= wait_seconds:
            raise LaunchError(
                f"the head {address} answers, but nobody listens at port {port} after {wait_seconds:.0f} s: start the "
                "job on the head too, with the same port"
            )
        if answered and not told:
            say(f"the head {address} answers; waiting until the job there listens at port {port}")
            told = True
        time.sleep(_PAUSE_SECONDS)


def _listed(known: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{name} ({addresses[0]})" for name, addresses in sorted(known.items()) if addresses) or "none"
