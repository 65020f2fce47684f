"""Nodes against each other: who came, versions, clocks, GPUs, ways; and the list of hosts to leave out."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.doctor.check_nodes import (
    blamed,
    check_arrival,
    check_clocks,
    check_gpus_alike,
    check_versions,
    check_ways,
    clock_offsets,
)
from disttrain.doctor.facts import Gpus, Way
from disttrain.doctor.finding import Finding, exit_code, failing_hosts, worst
from disttrain.doctor.judge import judge, responsible_for, write_failing_nodes
from disttrain.doctor.needs import Needs
from disttrain.doctor.versions import gather_versions, torch_versions
from tests.doctor.made_up import CARD, VERSIONS, healthy, only, record

THREE = Needs(nodes=3, head="a", port=29500)
A, B, C = (healthy(host) for host in "abc")


def test_nodes_that_fit() -> None:
    findings = judge(record(A, B, C), THREE)
    assert {finding.severity for finding in findings} == {"ok"}
    assert (worst(findings), exit_code(findings), failing_hosts(findings)) == ("ok", 0, [])


@pytest.mark.parametrize(
    ("change", "severity", "said"),
    [
        ({"torch": "2.12.1"}, "breaks", "torch is 2.12.1 on b, and 2.13.0 on 2 nodes"),
        ({"disttrain code": "00000000"}, "breaks", "disttrain code is 00000000 on b"),
        ({"NCCL": "2.27.3"}, "breaks", "NCCL is 2.27.3 on b, and none on 2 nodes"),
        ({"python": "3.12.1"}, "breaks", "python is 3.12.1 on b"),
        ({"python": "3.11.4"}, "warning", "python is 3.11.4 on b"),
        ({"driver": "550.1"}, "warning", "driver is 550.1 on b"),
    ],
)
def test_another_version(change: dict[str, str], severity: str, said: str) -> None:
    found = only(check_versions(record(A, healthy("b", versions=VERSIONS | change), C)), severity)
    assert said in found.what
    assert found.where == ("b",)


def test_of_two_versions_the_first_node_has_the_right_one() -> None:
    found = only(check_versions(record(A, healthy("b", versions=VERSIONS | {"torch": "2.12.1"}))))
    assert found.where == ("b",)


def test_own_versions_without_torch_being_imported(tmp_path: Path) -> None:
    import torch

    assert gather_versions()["torch"] == str(torch.__version__)
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cu128'\ncuda: str | None = '12.8'\nhip = None\n")
    assert torch_versions(tmp_path) == {"torch": "2.13.0+cu128", "CUDA": "12.8"}
    assert torch_versions(tmp_path / "absent") == {}


def off(ahead: float, error: float) -> tuple[Way, ...]:
    """a and b see c's clock `ahead` of theirs; c sees the others behind its own."""
    return (
        Way(source="a", target="b", clock_ahead_seconds=0.0, clock_error_seconds=error),
        Way(source="a", target="c", clock_ahead_seconds=ahead + 0.4, clock_error_seconds=error + 0.5),
        Way(source="c", target="a", clock_ahead_seconds=-ahead, clock_error_seconds=error),
        Way(source="b", target="c", clock_ahead_seconds=99.0, clock_error_seconds=0.0),
    )


@pytest.mark.parametrize(
    ("ahead", "error", "severity"), [(0.5, 0.01, "ok"), (5.0, 4.5, "ok"), (5.0, 0.01, "warning"), (-130.0, 1, "breaks")]
)
def test_a_clock_that_is_off(ahead: float, error: float, severity: str) -> None:
    """The best round trip to the first node counts, and what it can be wrong by is in favour of the node."""
    findings = check_clocks(record(A, B, C, ways=off(ahead, error)), THREE)
    assert clock_offsets(off(ahead, error), "a")["c"] == (ahead, error)
    (finding,) = findings
    assert finding.severity == severity
    if severity != "ok":
        assert finding.where == ("c",)
        assert ("behind" if ahead < 0 else "ahead of") in finding.what


def test_other_gpus_on_one_node() -> None:
    fewer = healthy("b", gpus=Gpus(cards=(CARD,) * 7))
    found = only(check_gpus_alike(record(A, fewer, C), THREE), "warning")
    assert "b: 7 x NVIDIA H100, and 2 nodes have 8 x NVIDIA H100" in found.what


def test_who_did_not_come() -> None:
    findings = check_arrival(record(A, B, missing_hosts=("c",)), THREE)
    found = only(findings)
    assert (found.where, found.what) == (("c",), "c did not come within 25 s; here are a, b")
    unknown = only(check_arrival(record(A, missing_hosts=("node 2 of 2",)), THREE))
    assert unknown.where == ()
    assert "call themselves a" in only(check_arrival(record(A, doubles=("a",)), THREE)).what
    assert "a:29500 does not answer: refused" in only(check_arrival(record(B, head_error="refused"), THREE)).what


def broken(*pairs: str) -> tuple[Way, ...]:
    """All ways between a, b and c, of which those named are not open."""
    every = [(source, target) for source in "abc" for target in "abc" if source != target]
    return tuple(
        Way(source=s, target=t, error="no answer" if s + t in pairs else None, connect_seconds=1e-4) for s, t in every
    )


@pytest.mark.parametrize(
    ("pairs", "hosts"),
    [
        (("ab", "cb"), {"b"}),  # nobody reaches b
        (("ba", "bc"), {"b"}),  # b reaches nobody
        (("ab", "ba", "ac", "ca"), {"a"}),  # the head itself is cut off
        (("ab",), {"b"}),  # one way only: not the head
    ],
)
def test_the_node_to_leave_out(pairs: tuple[str, ...], hosts: set[str]) -> None:
    findings = check_ways(record(A, B, C, ways=broken(*pairs)))
    assert len(findings) == len(pairs)
    assert {host for finding in findings for host in finding.where} == hosts
    assert blamed(Way(source="b", target="a", error="x"), [], "a") == "b"


def test_the_way_back_is_told() -> None:
    assert check_ways(record(A, B, C, ways=broken("ab")))[0].what.endswith("no answer; the other way is open")


def test_the_list_of_hosts_to_leave_out(tmp_path: Path) -> None:
    file = tmp_path / "failing_nodes.txt"
    bad = [Finding("breaks", "disk", "full", ("b",)), Finding("warning", "disk", "slow", ("c",))]
    assert write_failing_nodes(file, ["a"], []) == []
    assert not file.exists()
    assert write_failing_nodes(file, ["a", "b", "c"], bad) == ["b"]
    # A node that is examined by itself changes its own line only.
    write_failing_nodes(file, ["d"], [Finding("breaks", "disk", "full", ("d",))])
    assert file.read_text() == "b\nd\n"
    write_failing_nodes(file, ["b"], [])
    assert file.read_text() == "d\n"


def test_who_writes_which_line() -> None:
    bad = [Finding("breaks", "disk", "full", ("b",)), Finding("breaks", "arrival", "late", ("d",))]
    assert responsible_for(record(A, B, C), bad, alone=True) == {"a", "b", "c", "d"}
    assert responsible_for(record(A, B, C), bad, alone=False) == {"a", "d"}
    assert responsible_for(record(A, B, C, here="b"), bad, alone=False) == {"b"}
