"""What every sink offers."""

from __future__ import annotations

from typing import Protocol


class Sink(Protocol):
    def log(self, record: dict[str, float]) -> None:
        """One log step: `step`, `tokens` and the metrics, units in the names."""
        ...

    def close(self) -> None: ...
