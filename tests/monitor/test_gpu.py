"""What is measured on a GPU: parts of a step by events, memory peaks, kernels in a profile."""

import json
from pathlib import Path

import pytest
import torch

from disttrain.distributed.env import Ranks
from disttrain.monitor import MetricBuffer, ProcessUse, StepProfiler, build_clock, build_probe
from disttrain.monitor.clock import EventClock

pytestmark = pytest.mark.gpu


def multiply(times: int) -> torch.Tensor:
    matrix = torch.randn(2048, 2048, device="cuda")
    for _ in range(times):
        matrix = (matrix @ matrix).tanh()
    return matrix


def test_parts_are_the_devices_time() -> None:
    multiply(3)
    clock = build_clock(torch.device("cuda"))
    assert isinstance(clock, EventClock)
    for _ in range(3):
        clock.start()
        clock.lap("data")
        multiply(5)
        clock.lap("forward")
        multiply(50)
        clock.lap("backward")
        clock.stop()
    parts, steps = clock.read()
    assert parts["backward"] > 3 * parts["forward"] > 0
    assert sum(steps) == pytest.approx(parts["forward"] + parts["backward"], rel=0.5)
    assert clock.read() == ({}, [])


def test_nothing_waits_for_the_device_between_rows() -> None:
    buffer = MetricBuffer({"sum": "sum", "max": "max", "mean": "mean"}, torch.device("cuda"))
    clock, value = build_clock(torch.device("cuda")), torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        clock.start()
        for name in ("sum", "max", "mean"):
            buffer.add(name, value)
            buffer.add(name, 2.0)
        clock.lap("forward")
        clock.stop()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peaks_begin_anew() -> None:
    use = ProcessUse(torch.device("cuda"))
    block = torch.empty(64 << 20, device="cuda")
    high = use.look()["peak_allocated_bytes"]
    del block
    use.look()
    assert high - use.look()["peak_allocated_bytes"] >= 4 * (64 << 20)


def test_a_profile_has_kernels_and_memory(tmp_path: Path) -> None:
    profiler = StepProfiler((2, 3), tmp_path, Ranks(), torch.device("cuda"))
    lines: list[str] = []
    for step in (1, 2, 3, 4):
        profiler.before(step)
        multiply(5)
        lines += profiler.after(step)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == [2, 3]
    assert any("gemm" in row["name"].lower() or "cutlass" in row["name"].lower() for row in summary["operators"])
    assert (tmp_path / "memory-0.pickle").stat().st_size > 0
    assert lines


def test_a_device_is_timed_by_a_small_piece_of_work() -> None:
    probe = build_probe(torch.device("cuda"))
    assert probe is not None
    probe.seconds()
    assert 0 < probe.seconds() < 0.1
