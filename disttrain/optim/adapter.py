"""Any element-wise optimizer class, by its dotted name, on each process's shards as plain tensors."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.config.groups import Custom
from disttrain.errors import UserError
from disttrain.optim.sharding import like_sharded, local

_SHAPES: tuple[tuple[int, ...], ...] = ((7, 3), (1, 4), (5,), (8, 8))
_PIECES, _STEPS, _TOLERANCE = 3, 3, 1e-12


class AdaptedOptimizer:
    """Runs a class that knows nothing of shards: it is given local tensors, so no collective can happen inside it.

    `state` looks like that of any other optimizer: tensors only, cut as the parameter is, there from the start. Classes
    make theirs in the first step, so until then it is that of a step that changed nothing, for a load to write into.
    Raises UserError for a class that cannot be had or does not take the arguments.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.config: Custom = groups[0]["config"]
        self.inner_class = _find_class(self.config)
        self._shards = {p: nn.Parameter(local(p).detach()) for group in groups for p in group["params"]}
        self._inner = self._build()
        self._rehearsed: torch.optim.Optimizer | None = None
        self._numbers: dict[tuple[nn.Parameter, str], Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        self._rehearsed = None
        for ours, theirs in zip(self.param_groups, self._inner.param_groups, strict=True):
            if isinstance(theirs["lr"], Tensor):
                theirs["lr"].fill_(ours["lr"])
            else:
                theirs["lr"] = ours["lr"]
        for parameter, shard in self._shards.items():
            # FSDP2 may have moved the memory since the last step.
            shard.data = local(parameter).detach()
            shard.grad = None if parameter.grad is None else local(parameter.grad)
        self._inner.step()
        for shard in self._shards.values():
            shard.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._shards:
            parameter.grad = None

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Raises UserError for a state that is neither a number nor a tensor of the parameter's shape."""
        inner = self._inner
        if not inner.state:
            inner = self._rehearsed = self._rehearsed or self._rehearse()
        return {
            parameter: {key: self._stored(parameter, key, value) for key, value in inner.state[shard].items()}
            for parameter, shard in self._shards.items()
            if shard in inner.state
        }

    def loaded(self) -> None:
        """A load has written into `state`: go on from there."""
        self._inner = self._rehearsed or self._inner
        self._rehearsed = None
        for (parameter, key), number in self._numbers.items():
            values = self._inner.state[self._shards[parameter]]
            values[key] = type(values[key])(number.item())

    def _stored(self, parameter: nn.Parameter, key: str, value: Any) -> Tensor:
        if isinstance(value, bool | int | float):
            return self._numbers.setdefault((parameter, key), torch.zeros((), dtype=torch.float64)).fill_(value)
        if isinstance(value, Tensor) and value.dim() == 0:
            return value
        if isinstance(value, Tensor) and value.shape == local(parameter).shape:
            return like_sharded(value, parameter, parameter.shape)
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(
            f"{self.config.algorithm}: its state {key!r} is {kind}, where the parameter's shape is "
            f"{tuple(local(parameter).shape)}: checkpoints hold numbers and tensors like the parameter only"
        )

    def _build(self) -> torch.optim.Optimizer:
        groups = [{**group, "params": [self._shards[p] for p in group["params"]]} for group in self.param_groups]
        return _instance(self.inner_class, self.config, groups)

    @torch.no_grad()
    def _rehearse(self) -> torch.optim.Optimizer:
        """Another instance after one step with zero gradients; the weights are as before."""
        inner = self._build()
        kept = [shard.detach().clone() for shard in self._shards.values()]
        for shard in self._shards.values():
            shard.grad = torch.zeros_like(shard)
        inner.step()
        for shard, weight in zip(self._shards.values(), kept, strict=True):
            shard.copy_(weight)
            shard.grad = None
        return inner


def self_test(config: Custom) -> None:
    """Three steps on whole toy tensors against three steps on pieces of them, in this process.

    Raises UserError when they differ, when the class raises, or when it cannot be had: on every rank alike.
    """
    kind = _find_class(config)
    remedy = "it must be element-wise, for each process has rows of every tensor only"
    try:
        whole, pieces = (_toy_run(kind, config, count) for count in (1, _PIECES))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{config.algorithm}: {type(error).__name__} in three steps on toy tensors: {error}") from error
    for shape, expected, seen in zip(_SHAPES, whole, pieces, strict=True):
        difference = ((seen - expected).abs().max() / expected.abs().max()).item()
        if not difference <= _TOLERANCE:
            raise UserError(
                f"{config.algorithm}: after {_STEPS} steps a tensor of shape {shape} differs by {difference:.1e} from "
                f"the same tensor cut into {_PIECES} pieces; {remedy}"
            )


def _toy_run(kind: type[torch.optim.Optimizer], config: Custom, count: int) -> list[Tensor]:
    """The toy tensors after three steps in `count` pieces each (some without rows), whole again."""
    generator = torch.Generator().manual_seed(0)
    shards = []
    for shape in _SHAPES:
        cut = list(torch.randn(shape, generator=generator, dtype=torch.float64).chunk(count))
        cut += [cut[0][:0]] * (count - len(cut))
        shards.append([nn.Parameter(piece.clone()) for piece in cut])
    everything = [piece for tensor in shards for piece in tensor]
    weight_decay = config.weight_decay
    optimizer = _instance(kind, config, [{"params": everything, "lr": config.lr, "weight_decay": weight_decay}])
    for _ in range(_STEPS):
        for shape, tensor in zip(_SHAPES, shards, strict=True):
            gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
            for piece, part in zip(tensor, gradient.split([len(piece) for piece in tensor]), strict=True):
                piece.grad = part.clone()
        optimizer.step()
    return [torch.cat([piece.detach() for piece in tensor]) for tensor in shards]


def _instance(kind: type[torch.optim.Optimizer], config: Custom, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    takes = inspect.signature(kind).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
    if unknown := [] if anything else [name for name in config.arguments if name not in takes]:
        raise UserError(f"{config.algorithm}: takes no {', '.join(unknown)}; it takes {', '.join(list(takes)[1:])}")
    decays = "weight_decay" in takes or anything
    if not decays and any(group["weight_decay"] for group in groups):
        raise UserError(f"{config.algorithm}: takes no weight_decay; leave it out or set it to 0")
    keys = ("params", "lr", *(("weight_decay",) if decays else ()))
    try:
        return kind([{key: group[key] for key in keys} for group in groups], lr=config.lr, **_tuples(config.arguments))  # type: ignore[call-arg]
    except Exception as error:
        raise UserError(f"{config.algorithm}: cannot be made: {type(error).__name__}: {error}") from error


def _tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """TOML knows lists only, and optimizers like their betas as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def _find_class(config: Custom) -> type[torch.optim.Optimizer]:
    path, _, name = config.algorithm.rpartition(".")
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise UserError(f"{config.algorithm}: cannot import {path}: {error}") from error
    found = getattr(module, name, None)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        near = difflib.get_close_matches(name, classes, n=1)
        hint = f"; did you mean {path}.{near[0]}?" if near else ""
        wrong = "is no subclass of torch.optim.Optimizer" if found else f"is not in {path}"
        raise UserError(f"{config.algorithm}: {name} {wrong}{hint}")
    return found
