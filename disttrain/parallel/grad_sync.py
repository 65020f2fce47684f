"""When gradients travel, and what must happen before parameters are written."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


def set_gradient_sync(model: nn.Module, last: bool, grad_accumulation: str) -> None:
    """Say, before the forward of a microbatch, whether its backward reduces gradients over ranks.

    ddp reduces on the `last` microbatch. fsdp reduces on each when `grad_accumulation` is "sharded", else on the last.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or grad_accumulation == "sharded")


def parameters_will_change(model: nn.Module) -> None:
    """Call before writing to parameters other than by an optimizer step (load, rollback, swap), and after evaluation.

    FSDP2 may still hold gathered weights from a forward; without this the next forward would compute with those.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
