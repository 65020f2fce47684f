"""Trading computation for memory: activations that are recomputed in the backward instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed._composable import checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operations whose results `selective` keeps: they cost far more to compute again than to hold."""


def apply_activation_checkpointing(blocks: Sequence[nn.Module], mode: str, every: int) -> None:
    """Mark `blocks` for recomputation: none, all (`full`), each `every`-th, or all but `_KEPT` (`selective`).

    The composable form leaves parameter names as they are, on which initial weights and checkpoints depend.
    """
    if mode == "none":
        return
    options: dict[str, Callable[[], Any]] = {"context_fn": _keep_expensive} if mode == "selective" else {}
    for block in blocks[:: every if mode == "every_n" else 1]:
        checkpoint(block, **options)


def _keep_expensive() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
