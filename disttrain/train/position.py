"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Optimizer steps done, tokens that count for schedules, and samples consumed: after a rollback more samples than
    these tokens have, for the data of undone steps are not seen again."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, samples: int, sequence_length: int) -> Position:
        return Position(self.step + 1, self.samples + samples, self.tokens + samples * sequence_length)
