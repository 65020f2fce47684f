"""How often a run may be started again. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class RestartBudget:
    """`limit` restarts without a new checkpoint between them: a run that gets on may be started again for ever."""

    def __init__(self, limit: int, saved: Sequence[Path]) -> None:
        self.limit, self.used = limit, 0
        self._newest = saved[:1]

    def allows(self, saved: Sequence[Path]) -> bool:
        """Whether to start once more; `saved` are the checkpoints that there are now, newest first."""
        if saved[:1] != self._newest:
            self._newest, self.used = saved[:1], 0
        self.used += 1
        return self.used <= self.limit
