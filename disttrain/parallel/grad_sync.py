"""When gradients travel and gathered weights are freed, and what must happen before parameters are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from disttrain.config.parallel import ParallelConfig


@dataclass(frozen=True)
class SyncRules:
    """What tells the sharded strategies apart; docs/strategies.md counts what follows from it."""

    reshard_after_forward: bool
    """Gathered weights of blocks are freed between forward and backward; the root's never are."""
    reduce_each: bool
    """Gradients are reduced after every microbatch, not only after the last one."""
    free_each: bool
    """Gathered weights are freed after the backward of every microbatch, not only of the last one."""

    @staticmethod
    def of(config: ParallelConfig) -> SyncRules:
        if config.strategy in ("zero1", "zero2"):
            return SyncRules(reshard_after_forward=False, reduce_each=config.strategy == "zero2", free_each=False)
        return SyncRules(
            reshard_after_forward=config.reshard_after_forward is not False,
            reduce_each=config.strategy != "ddp" and config.grad_accumulation != "unsharded",
            free_each=True,
        )


def set_gradient_sync(model: nn.Module, last: bool, rules: SyncRules) -> None:
    """Say, before the forward of a microbatch, what its backward does; `last` is the step's last microbatch."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or rules.reduce_each)
        # Replicas agree once a step: until then a shard's sum over its own group waits where it is.
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or rules.free_each)


def drop_gradients(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Call after an update. DDP's gradients stay, at zero: they look into its buckets, and the next ones are added
    there; without them, those of all microbatches but the last would lie beside the buckets, and be copied."""
    if isinstance(model, DistributedDataParallel):
        torch._foreach_zero_([parameter.grad for parameter in parameters if parameter.grad is not None])
        return
    for parameter in parameters:
        parameter.grad = None


def parameters_will_change(model: nn.Module) -> None:
    """Call before writing to parameters other than by an optimizer step (load, rollback, swap), and after evaluation.

    FSDP2 may still hold gathered weights from a forward; without this the next forward would compute with those.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if (group := module._get_fsdp_state()._fsdp_param_group) is not None:
                group.wait_for_unshard()  # of weights asked for early, by a forward that never came to them
            module.reshard()
