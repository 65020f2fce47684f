"""Nodes of a cluster on one machine: network namespaces, each with an address and a host name, joined by one bridge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests.cli.helpers import started

needs_namespaces = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces need Linux, root and iproute2",
)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Node:
    namespace: str
    name: str
    address: str
    interface: str

    def command(self, *command: object) -> tuple[str, ...]:
        """`command` on this node, under its host name."""
        as_host = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name)
        return ("ip", "netns", "exec", self.namespace, *as_host, *(str(part) for part in command))

    def limit(self, rate: str) -> None:
        """What the node sends; what it gets stays fast. Skips where the kernel has no such thing."""
        bucket = ("rate", rate, "burst", "16kb", "latency", "200ms")
        made = self._tc("qdisc", "replace", "dev", self.interface, "root", "tbf", *bucket)
        if made.returncode:
            pytest.skip(f"tc tbf does not work here: {made.stderr.strip()}")

    def held_back(self) -> int:
        """How often a packet had to wait for the limit."""
        told = self._tc("-s", "-j", "qdisc", "show", "dev", self.interface).stdout
        return int(json.loads(told)[0]["overlimits"])

    def _tc(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = ("ip", "netns", "exec", self.namespace, "tc", *words)
        return subprocess.run(command, capture_output=True, text=True, timeout=20)

    @contextmanager
    def started(self, *command: object, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
        with started(*self.command(*command), env=env) as process:
            yield process


@contextmanager
def cluster(count: int) -> Iterator[list[Node]]:
    """`count` nodes that see each other and nobody else; all namespaces are gone afterwards."""
    prefix = f"dt{os.getpid() % 100_000}"
    switch = f"{prefix}s"
    with ExitStack() as stack:
        try:
            _namespace(stack, switch)
            ip("-n", switch, "link", "add", "br0", "type", "bridge")
        except OSError as error:
            pytest.skip(f"this machine gives no network namespaces: {error}")
        ip("-n", switch, "link", "set", "br0", "up")
        nodes = [Node(f"{prefix}n{i}", f"node-{i}", f"10.77.0.{i + 1}", f"veth{i}") for i in range(count)]
        for node in nodes:
            _namespace(stack, node.namespace)
            # Both ends are named where they belong, so that nothing of this shows on the machine itself.
            ip(
                "-n",
                node.namespace,
                "link",
                "add",
                node.interface,
                "type",
                "veth",
                "peer",
                node.interface,
                "netns",
                switch,
            )
            ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.interface)
            ip("-n", node.namespace, "link", "set", node.interface, "up")
            ip("-n", switch, "link", "set", node.interface, "master", "br0", "up")
        yield nodes


def _namespace(stack: ExitStack, name: str) -> None:
    ip("netns", "add", name)
    stack.callback(ip, "netns", "del", name)
    ip("-n", name, "link", "set", "lo", "up")
