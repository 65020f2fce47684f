"""Interfaces and routes of this machine, as the kernel tells of them. Nothing is sent, and no torch here."""

from __future__ import annotations

import fnmatch
import socket
from collections.abc import Iterable, Mapping, Sequence

import psutil

SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""What gloo, nccl and TensorPipe read the interface from."""
ELSEWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737): the way to it is the default route."""


def interface_addresses() -> dict[str, list[str]]:
    """Addresses (IPv4 and IPv6, without the link-local ones) by interface."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [one.address for one in addresses if one.family in families and "%" not in one.address]
        for name, addresses in psutil.net_if_addrs().items()
    }


def source_address(address: str) -> str:
    """Our own address on the way to `address`, which a connected datagram socket knows; OSError where there is none."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def interface_of(address: str, known: Mapping[str, Iterable[str]]) -> str | None:
    """The interface that has this address."""
    return next((name for name, addresses in known.items() if address in addresses), None)


def named_interfaces(variable: str, value: str, known: Sequence[str]) -> list[str]:
    """Those of `known` that would be taken: gloo wants whole names; NCCL prefixes, `=` for whole names, `^` for all
    but."""
    names = [name.strip() for name in value.lstrip("^=").split(",") if name.strip()]
    if not variable.startswith("NCCL"):
        return [name for name in known if name in names]
    patterns = names if value.lstrip("^").startswith("=") else [f"{name}*" for name in names]
    hit = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return [name for name in known if name not in hit] if value.startswith("^") else hit
