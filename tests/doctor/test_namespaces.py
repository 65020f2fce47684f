"""Nodes with addresses and names of their own on one machine: network namespaces, joined by a bridge in a fourth one.

All traffic stays inside them. Needs root and iproute2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import environment, finish, started

NODES = 3
PORT = 29417


def sh(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def possible() -> str | None:
    """Why there can be no namespaces here."""
    if os.getuid() != 0:
        return "making network namespaces needs root"
    if missing := [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed (iproute2, util-linux)"
    name = f"dtry{os.getpid()}"
    made = sh("ip", "netns", "add", name)
    if made.returncode == 0:
        made = sh("ip", "-n", name, "link", "add", "br0", "type", "bridge")
        sh("ip", "netns", "del", name)
    return made.stderr.strip() or None


class Cluster:
    """Node i, from 1, has the address 10.79.0.i on eth0 and the host name node-i."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bridge = f"{name}b"

    def make(self) -> None:
        self._ip("netns", "add", self.bridge)
        self._ip("-n", self.bridge, "link", "add", "br0", "type", "bridge")
        self._ip("-n", self.bridge, "link", "set", "br0", "up")
        for node in range(1, NODES + 1):
            self._ip("netns", "add", f"{self.name}{node}")
            own = ("-n", f"{self.name}{node}")
            self._ip(*own, "link", "set", "lo", "up")
            ends = ("eth0", "type", "veth", "peer", "name", f"port{node}", "netns", self.bridge)
            self._ip(*own, "link", "add", *ends)
            self._ip(*own, "addr", "add", f"10.79.0.{node}/24", "dev", "eth0")
            self._ip(*own, "link", "set", "eth0", "up")
            self._ip("-n", self.bridge, "link", "set", f"port{node}", "master", "br0", "up")

    def remove(self) -> None:
        for name in (self.bridge, *(f"{self.name}{node}" for node in range(1, NODES + 1))):
            sh("ip", "netns", "del", name)

    def inside(self, node: int, *command: object) -> list[object]:
        named = ["unshare", "--uts", "sh", "-c", f'hostname node-{node}; exec "$@"', "--"]
        return ["ip", "netns", "exec", f"{self.name}{node}", *named, *command]

    def limit(self, node: int, rate: str) -> None:
        """What the node sends; what it gets stays fast."""
        device = ("dev", "eth0", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "200ms")
        made = sh("ip", "netns", "exec", f"{self.name}{node}", "tc", "qdisc", "replace", *device)
        if made.returncode:
            pytest.skip(f"tc tbf does not work here: {made.stderr.strip()}")

    def doctors(self, *arguments: object, **variables: str) -> list[tuple[int, dict[str, Any]]]:
        """Exit codes and what they found, of a doctor on each node; {} where one printed nothing."""
        with ExitStack() as running:
            processes = []
            for node in range(1, NODES + 1):
                own = {key: value.format(rank=node - 1) for key, value in variables.items()}
                command = self.inside(node, sys.executable, "-m", "disttrain", "doctor", "--json", *arguments)
                processes.append(running.enter_context(started(*command, env=environment(**own))))
            ended = [finish(process) for process in processes]
        return [(each.code, json.loads(each.out) if each.out else {}) for each in ended]

    def _ip(self, *arguments: str) -> None:
        made = sh("ip", *arguments)
        assert made.returncode == 0, (arguments, made.stderr)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    if (why := possible()) is not None:
        pytest.skip(why)
    monkeypatch.chdir(tmp_path)
    cluster = Cluster(f"doc{os.getpid()}n")
    try:
        cluster.make()
        yield cluster
    finally:
        cluster.remove()


def found(answer: dict[str, Any], severity: str, check: str) -> list[dict[str, Any]]:
    return [each for each in answer["findings"] if (each["severity"], each["check"]) == (severity, check)]


LAUNCHED = {
    "RANK": "{rank}",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "10.79.0.1",
    "MASTER_PORT": str(PORT),
    "GLOO_SOCKET_IFNAME": "eth0",
}


def test_a_slow_link_is_named(cluster: Cluster) -> None:
    """Node 3 sends 50 Mbit/s, a small part of what a bridge in memory carries."""
    cluster.limit(3, "50mbit")
    (code, answer), *others = cluster.doctors(**LAUNCHED)
    assert (code, [code for code, _ in others], [answer for _, answer in others]) == (0, [0, 0], [{}, {}])
    (slow,) = found(answer, "warning", "links")
    # On a busy machine another link may be slow too; the slowest is this one.
    assert "node-3" in slow["where"]
    assert slow["figures"]["sender"] == 2
    assert {each["backend"] for each in answer["facts"]["ranks"]} == {"gloo"}
    assert not [each for each in answer["findings"] if each["severity"] == "breaks"]


def test_a_node_that_is_cut_off(cluster: Cluster, tmp_path: Path) -> None:
    """It sees the shared folder, as over another network, but nobody reaches it."""
    sh("ip", "-n", cluster.bridge, "link", "set", "port2", "down")
    variables = {"GLOO_SOCKET_IFNAME": "eth0"}
    (code, answer), *_ = cluster.doctors("--share", tmp_path / "share", "--nodes", 3, "--wait", 2, **variables)
    assert code == 1
    assert {host for each in found(answer, "breaks", "reach") for host in each["where"]} == {"node-2"}
    assert (tmp_path / "share" / "failing_nodes.txt").read_text() == "node-2\n"


def test_host_names_that_lead_nowhere(cluster: Cluster) -> None:
    """Without GLOO_SOCKET_IFNAME gloo would take 127.0.0.1, and all would wait: told in place of being tried."""
    variables = {name: value for name, value in LAUNCHED.items() if name != "GLOO_SOCKET_IFNAME"}
    (code, answer), *_ = cluster.doctors(**variables)
    assert code == 1
    assert len(found(answer, "breaks", "network")) == 3
    assert found(answer, "breaks", "network")[0]["remedy"].endswith("or set GLOO_SOCKET_IFNAME=eth0")
    assert answer["facts"]["ranks"] == []
    assert "network is not fit" in found(answer, "note", "ranks")[0]["what"]


def test_a_head_that_is_nowhere(cluster: Cluster) -> None:
    """An address of the network that no node has; no answer ever comes from there."""
    lost = LAUNCHED | {"RANK": "1", "MASTER_ADDR": "10.79.0.99"}
    command = cluster.inside(2, sys.executable, "-m", "disttrain", "doctor", "--json", "--wait", "1")
    with started(*command, env=environment(**lost)) as process:
        ended = finish(process)
    assert ended.code == 1, ended
    (arrival,) = found(json.loads(ended.out), "breaks", "arrival")
    assert arrival["what"].startswith("the head 10.79.0.99:29417 does not answer: ")
    assert Path("failing_nodes.txt").read_text() == "node-2\n"
