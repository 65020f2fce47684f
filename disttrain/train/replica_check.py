"""Ranks that hold the same weights compare them: memory that loses a bit says nothing by itself."""

from __future__ import annotations

import socket

import torch
from torch import Tensor, nn

from disttrain.config import RunConfig
from disttrain.distributed.collectives import dist_all_gather_rows
from disttrain.errors import CorruptionError
from disttrain.parallel.replicas import held_within_steps, odd_ones, replica_groups, total_sum, weight_sums

_SHOWN = 5
_HOST_BYTES = 64


class ReplicaCheck:
    """Every `resilience.compare_replicas_every` steps, and before a checkpoint where copies last longer than a step."""

    def __init__(self, config: RunConfig, gpt: nn.Module, world: int) -> None:
        self.every, self.module = config.resilience.compare_replicas_every, gpt
        self.groups = replica_groups(config.parallel, config.dims(world)) if self.every else []
        self.within_steps = held_within_steps(config.parallel)
        """Then copies are there only in a step, which must be told beforehand to look at them."""

    def due(self, step: int) -> bool:
        return bool(self.groups) and step % self.every == 0

    def between_steps(self, step: int, saving: bool) -> bool:
        """Whether to compare now, after a `step`."""
        return bool(self.groups) and not self.within_steps and (saving or self.due(step))

    def dist_compare(self, step: int, sums: Tensor | None = None) -> None:
        """Collective, one small gather. `sums` are those of copies that are gone; by default what there is now.

        Raises CorruptionError on every rank, naming ranks and parameters.
        """
        sums = weight_sums(self.module.parameters()) if sums is None else sums
        totals = dist_all_gather_rows(total_sum(sums).reshape(1)).flatten().tolist()
        outvoted, undecided = odd_ones(totals, self.groups)
        if not outvoted and not undecided:
            return
        rows, hosts = dist_all_gather_rows(sums), _dist_hosts(sums.device)
        found = [
            f"{_listed([f'rank {r} on {hosts[r]}' for r in odd])}: {_listed(self._different(rows, odd))} {what}"
            for odd, what in (
                (outvoted, "not as on the other ranks that hold the same, which are more"),
                (undecided, "not the same on all of them, and no majority tells which is right"),
            )
            if odd
        ]
        compared = "" if self.within_steps else ", before which all copies were compared"
        raise CorruptionError(
            f"step {step}: weights that should be equal are not. {'; '.join(found)}. Memory or a link has changed "
            "bits, or ranks compute on unlike hardware (then resilience.compare_replicas_every = 0 turns this off). "
            f"Starting again resumes from the newest checkpoint{compared}; if it comes back, leave that machine out"
        )

    def _different(self, rows: Tensor, odd: list[int]) -> list[str]:
        """Parameters of which an odd rank holds something else than one of its copies does."""
        groups = [group for group in self.groups if set(group) & set(odd)]
        differs = torch.stack([(rows[group] != rows[group[0]]).any(0) for group in groups]).any(0).tolist()
        names = [name for name, _ in self.module.named_parameters()]
        return [name for name, different in zip(names, differs, strict=True) if different]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _dist_hosts(device: torch.device) -> list[str]:
    name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES)
    rows = dist_all_gather_rows(torch.tensor(list(name), dtype=torch.uint8, device=device))
    return [bytes(row).decode(errors="replace").strip() for row in rows.tolist()]
