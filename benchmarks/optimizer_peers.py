"""Other people's optimizers of whole matrices on the same sharded model, for `optimizers.py`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from disttrain.models import GPT_PLAN

PEERS = ["torch.optim.Muon"]
if importlib.util.find_spec("heavyball"):
    PEERS += ["heavyball.Muon", "heavyball.SOAP"]


class PeerSet:
    """A peer for the hidden matrices and torch's fused AdamW for the rest."""

    def __init__(self, model: nn.Module, peer: str) -> None:
        parameters = dict(model.named_parameters())
        matrices = [p for name, p in parameters.items() if re.search(GPT_PLAN.roles["matrices"], name)]
        ours = set(map(id, matrices))
        rest = [p for p in parameters.values() if id(p) not in ours]
        self.optimizers = [_build(peer, matrices), torch.optim.AdamW(rest, lr=1e-3, fused=True)]

    @property
    def state(self) -> Mapping[Any, Any]:
        return {key: value for optimizer in self.optimizers for key, value in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def _build(peer: str, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    if peer == "torch.optim.Muon":
        return torch.optim.Muon(matrices, lr=1e-3)
    import heavyball

    heavyball.utils.compile_mode = None  # as ours: eager
    return getattr(heavyball, peer.rpartition(".")[2])(matrices, lr=1e-3)
