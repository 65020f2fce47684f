"""Parts of a step: what the thread does itself, and what it sleeps through."""

import threading
import time

import pytest
import torch

from disttrain.monitor.clock import HostClock, build_clock


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_parts_add_up_and_sleep_is_waiting_for_others() -> None:
    clock = HostClock()
    began = time.perf_counter()
    clock.start()
    time.sleep(0.02)  # data may come from a disk: that is no communication
    clock.lap("data")
    time.sleep(0.03)
    clock.lap("communication")
    busy(0.02)
    time.sleep(0.05)
    clock.lap("forward")
    busy(0.02)
    clock.lap("backward")
    clock.stop()
    wall = time.perf_counter() - began
    parts, steps = clock.read()
    assert set(parts) == {"data", "communication", "forward", "backward"}
    assert parts["data"] >= 0.02
    assert parts["communication"] >= 0.08 - 1e-3
    assert parts["forward"] >= 0.02 - 1e-3
    assert sum(parts.values()) <= wall
    assert steps == [pytest.approx(sum(parts.values()) - parts["communication"])]
    assert clock.read() == ({}, [])


def test_a_core_that_others_use_is_not_communication() -> None:
    """More threads than cores: what this one waits for a core is its own time, not its peers'."""
    stop = threading.Event()
    clock = HostClock()
    if clock._waited_for_core.seconds() == 0.0 and clock._waited_for_core._file is None:
        pytest.skip("this system does not tell how long a thread waited for a core")
    torch.set_num_threads(1)

    def multiply() -> None:
        matrix = torch.randn(200, 200)
        while not stop.is_set():
            matrix @ matrix  # without the interpreter's lock

    others = [threading.Thread(target=multiply) for _ in range(4)]
    for thread in others:
        thread.start()
    try:
        matrix = torch.randn(700, 700)
        clock.start()
        for _ in range(10):
            matrix = (matrix @ matrix).tanh()
        clock.lap("forward")
    finally:
        stop.set()
        for thread in others:
            thread.join()
    parts, _ = clock.read()
    # Against the share of wall time that four busy rivals take: most of it without the correction.
    assert parts["communication"] < 0.5 * parts["forward"]


def test_a_cpu_has_the_clock_of_the_host() -> None:
    assert isinstance(build_clock(torch.device("cpu")), HostClock)
