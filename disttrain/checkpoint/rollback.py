"""Going back within a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from disttrain.checkpoint.agreement import on_rank_zero
from disttrain.checkpoint.manager import CheckpointManager
from disttrain.checkpoint.reading import CheckpointInfo
from disttrain.errors import UserError


def roll_back(
    manager: CheckpointManager, state: Mapping[str, Tensor], before: int, good: Callable[[], bool]
) -> CheckpointInfo | None:
    """Load the newest checkpoint of a step before `before` that verifies and after whose load `good` says yes, on
    every rank alike; None when there is none.

    Then those passed over are deleted, or a resume would take them: the run will not have been there. Collective; no
    save may be under way.
    """
    passed: list[str] = []
    for name in on_rank_zero(manager.storage.committed):
        try:
            info = CheckpointInfo(name, manager.storage.place(name), manager.verified(name))
        except UserError:
            continue  # damaged: a resume passes it over too
        if info.manifest.step < before:
            manager.load(state, info)
            if good():
                manager.retention.protected = name
                for later in passed:
                    on_rank_zero(partial(manager.storage.remove, later))
                return info
        passed.append(name)
    return None
