"""What every sink offers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from disttrain.monitor.record import Record

Ending = Literal["completed", "preempted", "failed"]


@dataclass(frozen=True)
class Event:
    """Something that happened to a run, for its time line."""

    unix_seconds: float
    step: int
    kind: str
    """start, resume, checkpoint, warning, stop, completed, failed, ..."""
    text: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Sink(Protocol):
    def log(self, record: Record) -> None:
        """One row: `step`, `tokens` and the metrics, units in the names. Steps never go backwards."""
        ...

    def event(self, event: Event) -> None: ...

    def sample(self, step: int, text: str) -> None:
        """Text that the model wrote."""
        ...

    def close(self, ending: Ending) -> None: ...
