"""Memory and processor time of this process."""

from __future__ import annotations

import time

import psutil
import torch


class ProcessUse:
    """What this process has used since the last look."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process = psutil.Process()
        self._mark = (time.perf_counter(), time.process_time())

    def look(self) -> dict[str, float]:
        """`host_rss_bytes` now, `cpu_share` of one core by all threads; on CUDA the peaks `peak_allocated_bytes` and
        `peak_reserved_bytes`."""
        now = (time.perf_counter(), time.process_time())
        wall, busy = now[0] - self._mark[0], now[1] - self._mark[1]
        self._mark = now
        use = {"host_rss_bytes": float(self._process.memory_info().rss), "cpu_share": busy / wall if wall > 0 else 0.0}
        if self.device.type == "cuda":
            use["peak_allocated_bytes"] = float(torch.cuda.max_memory_allocated(self.device))
            use["peak_reserved_bytes"] = float(torch.cuda.max_memory_reserved(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        return use

    @property
    def names(self) -> list[str]:
        on_device = ["peak_allocated_bytes", "peak_reserved_bytes"] if self.device.type == "cuda" else []
        return ["host_rss_bytes", "cpu_share", *on_device]
