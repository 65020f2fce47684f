"""Model and optimizer as one flat dictionary of tensors, named by parameter, and its comparison with a manifest."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from disttrain.checkpoint.manifest import Manifest, TensorEntry
from disttrain.errors import UserError
from disttrain.optim import OptimizerSet

# Compilation and activation checkpointing wrap modules; names must not depend on either.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_SHOWN = 10

SERVICE_PREFIX = "service."


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.NAME` for every parameter and persistent buffer: the live tensors, tied ones once.

    Under FSDP2 the values are DTensors, under DDP and alone plain tensors; a DDP wrapper is looked through.
    """
    module = _unwrapped(model)
    persistent = {_plain_name(name) for name in module.state_dict()}
    buffers = {_plain_name(name): buffer for name, buffer in module.named_buffers()}
    state: dict[str, Tensor] = {f"model.{_plain_name(name)}": p for name, p in module.named_parameters()}
    state |= {f"model.{name}": buffer for name, buffer in buffers.items() if name in persistent}
    return state


def training_state(model: nn.Module, optimizer: Optimizer | OptimizerSet) -> dict[str, Tensor]:
    """`model_state` plus `optim.NAME.KEY` for every optimizer state tensor of every parameter it updates.

    Where an algorithm trains at other weights than those to be used, `model.NAME` is a copy of the latter, whoever
    reads the checkpoint, and the live parameter is `optim.NAME.training_weight`, so that a load restores its bits.
    The optimizer state must exist: before a load into a fresh optimizer the caller materialises it. Scalars such as
    `step` must be tensors, equal on all ranks. Raises UserError for a parameter without state or with other values.
    """
    state = model_state(model)
    # Only torch's own make their state in the first step.
    lazy = isinstance(optimizer, Optimizer)
    averages = {} if isinstance(optimizer, Optimizer) else optimizer.averages()
    states = optimizer.state
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    problems: list[str] = []
    for raw_name, parameter in _unwrapped(model).named_parameters():
        name = _plain_name(raw_name)
        values = states.get(parameter, {})
        if parameter in averages:
            state[f"model.{name}"] = averages[parameter]
            state[f"optim.{name}.training_weight"] = parameter
        if lazy and id(parameter) in updated and not values:
            problems.append(f"optim.{name}: no optimizer state yet; take or simulate one optimizer step first")
        for key, value in values.items():
            if isinstance(value, Tensor):
                state[f"optim.{name}.{key}"] = value
            else:
                problems.append(f"optim.{name}.{key}: {type(value).__name__}, not a tensor; keep it as a 0-d tensor")
    if problems:
        raise UserError(_shortened(problems))
    return state


def is_optional(name: str) -> bool:
    """Whether a run may go on without this tensor, or with it new: histories of watchers, named `service.OWNER.KEY`."""
    return name.startswith(SERVICE_PREFIX)


def fits(tensor: Tensor, entry: TensorEntry) -> bool:
    """Dtype and shape are those of the checkpoint's."""
    return (entry.dtype, entry.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def differences(state: Mapping[str, Tensor], manifest: Manifest) -> list[str]:
    """What keeps the checkpoint from filling `state`: missing, unexpected and mismatched tensors, in words."""
    alone = {name for name in state.keys() ^ manifest.tensors.keys() if not is_optional(name)}
    missing = [f"{name}: not in the checkpoint" for name in state if name in alone]
    unexpected = [f"{name}: in the checkpoint, but not asked for" for name in manifest.tensors if name in alone]
    mismatched: list[str] = []
    for name, tensor in state.items():
        entry = manifest.tensors.get(name)
        if entry and not fits(tensor, entry) and not is_optional(name):
            here = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            mismatched.append(f"{name}: {entry.dtype} {entry.shape} in the checkpoint, {here} here")
        if tensor.is_meta:
            mismatched.append(f"{name}: still on the meta device; materialise it before loading")
    return [*_shortened(missing), *_shortened(unexpected), *_shortened(mismatched)]


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - _SHOWN
    return problems if more <= 0 else [*problems[:_SHOWN], f"... and {more} more like this"]
