"""What all ranks must agree on: small values exchanged as tensors, and errors that every rank raises together.

Every function is collective over the default process group and works alone when there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from disttrain.errors import StorageError, UserError

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather_json(value: Any) -> list[Any]:
    """Give every rank the JSON value of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    lengths = _all_gather(torch.tensor([payload.numel()], device=payload.device))
    padded = payload.new_zeros(int(max(lengths)))
    padded[: payload.numel()] = payload
    pairs = zip(_all_gather(padded), lengths, strict=True)
    return [json.loads(text[: int(length)].cpu().numpy().tobytes()) for text, length in pairs]


def raise_together(problems: Sequence[str]) -> None:
    """Raise UserError on every rank when any rank has a problem, with each distinct problem once."""
    everywhere = [problem for found in all_gather_json(list(problems)) for problem in found]
    if everywhere:
        raise UserError(dict.fromkeys(everywhere))


def on_rank_zero(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its JSON value everywhere; what it raises is raised everywhere.

    UserError and StorageError stay what they are, OSError becomes a StorageError; any other exception keeps its type on
    rank 0 and is a RuntimeError elsewhere.
    """
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if rank_and_world()[0] == 0:
        try:
            outcome["value"] = function()
        except UserError as error:
            outcome["problems"], outcome["storage"] = error.problems, isinstance(error, StorageError)
        except OSError as error:
            place, why = error.filename or "checkpoint", error.strerror or error
            outcome["problems"], outcome["storage"] = [f"{place}: {why}; check the disk and permissions"], True
        except Exception as error:
            outcome["failure"], failure = f"rank 0: {type(error).__name__}: {error}", error
    outcome = all_gather_json(outcome)[0]
    if failure is not None:
        raise failure
    if "problems" in outcome:
        raise (StorageError if outcome["storage"] else UserError)(outcome["problems"])
    if "failure" in outcome:
        raise RuntimeError(outcome["failure"])
    return outcome["value"]


def _all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


def _device() -> torch.device:
    # "cpu:gloo,cuda:nccl" can carry CPU tensors; a group with nccl alone cannot.
    if "cpu:" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
