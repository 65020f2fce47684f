"""Traces in brief, from events made by hand."""

from typing import Any

import pytest

from disttrain.monitor.trace import difference, length, self_times, summarise_trace, union


def event(name: str, start: float, end: float, tid: int = 1, cat: str = "cpu_op") -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start, "dur": end - start, "tid": tid, "cat": cat}


def test_intervals() -> None:
    assert union([(5, 7), (1, 2), (2, 3), (6, 9)]) == [(1, 3), (5, 9)]
    assert difference([(0, 10), (20, 30)], [(2, 3), (5, 25)]) == [(0, 2), (3, 5), (25, 30)]
    assert difference([(0, 10)], []) == [(0, 10)]
    assert difference([(0, 10)], [(0, 10)]) == []
    assert length([(0, 2), (3, 5)]) == 4


def test_time_of_an_operators_own() -> None:
    nested = [event("outer", 0, 10), event("inner", 2, 6), event("innermost", 3, 4), event("inner", 7, 8)]
    assert self_times(nested) == [("outer", 5), ("inner", 3), ("innermost", 1), ("inner", 1)]


def test_a_cpu() -> None:
    events = [
        event("aten::mm", 0, 4e6),
        event("c10d::allreduce_", 4e6, 10e6),  # waiting is no computing
        event("aten::add", 10e6, 12e6),
        event("aten::copy_", 0, 12e6, tid=7) | {"cat": "other"},
        event("gloo:all_reduce", 3e6, 10e6, tid=2, cat="user_annotation"),
        event("gloo:all_gather", 11e6, 12e6, tid=2, cat="user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]
    summary = summarise_trace(events, steps=2)
    assert summary["step_seconds"] == 6.0
    assert summary["communication_seconds"] == 4.0
    assert summary["exposed_communication_seconds"] == 3.0
    assert [row["name"] for row in summary["operators"]] == ["c10d::allreduce_", "aten::mm", "aten::add"]
    assert summary["operators"][1]["self_seconds"] == 2.0
    assert sum(row["share"] for row in summary["operators"]) == pytest.approx(1.0)


def test_a_gpu_is_its_kernels() -> None:
    events = [
        event("aten::mm", 0, 50e6),  # the host waits
        event("gemm", 0, 4e6, tid=7, cat="kernel"),
        event("ncclDevKernel_AllGather", 2e6, 7e6, tid=8, cat="kernel"),
        event("gemm", 6e6, 10e6, tid=7, cat="kernel"),
    ]
    summary = summarise_trace(events, steps=1)
    assert (summary["step_seconds"], summary["communication_seconds"]) == (10.0, 5.0)
    assert summary["exposed_communication_seconds"] == 2.0
    assert summary["operators"][0] == {"name": "gemm", "calls": 2, "self_seconds": 8.0, "share": pytest.approx(8 / 13)}


def test_nothing() -> None:
    assert summarise_trace([], steps=1)["operators"] == []
