"""The optimizers of a run as one: each parameter belongs to exactly one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.config.groups import Group
from disttrain.optim.elementwise import ScheduleFreeAdamW
from disttrain.optim.matrix_optimizer import MatrixOptimizer
from disttrain.optim.state_precision import LowPrecisionStates


class OptimizerSet:
    """Torch's optimizers, ours, and adapted ones; `param_groups` and `state` as in `torch.optim`, over all of them."""

    def __init__(self, optimizers: Sequence[Any], names: Mapping[nn.Parameter, str]) -> None:
        self.optimizers = list(optimizers)
        self._names = dict(names)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["class"] = _class_name(optimizer)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[nn.Parameter, Mapping[str, Tensor]]:
        """Every parameter's state tensors; the optimizers' own, so that a load may write into them."""
        return {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}

    @property
    def parameter_names(self) -> list[str]:
        return list(self.named_parameters)

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """In the order of `param_groups`."""
        return {self._names[p]: p for group in self.param_groups for p in group["params"]}

    @property
    def points(self) -> dict[nn.Parameter, list[Tensor]]:
        """Each parameter with the state tensors that are weights too: who scales a weight must scale them."""
        states = self.state
        found = {p: [p.detach()] for p in self._names}
        for optimizer in self.optimizers:
            if isinstance(optimizer, ScheduleFreeAdamW):
                found |= {p: [p.detach(), states[p]["z"]] for group in optimizer.param_groups for p in group["params"]}
        return found

    @property
    def groups(self) -> list[tuple[Group, list[str]]]:
        """Each group's section and the names of its parameters."""
        return [(group["config"], [self._names[p] for p in group["params"]]) for group in self.param_groups]

    @property
    def matrix_optimizers(self) -> list[MatrixOptimizer]:
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, MatrixOptimizer)]

    @property
    def looking_steps(self) -> int:
        """Steps in which some algorithm moves nothing yet."""
        return max((group["config"].looking_steps for group in self.param_groups), default=0)

    def step(self, skip: Tensor | None = None) -> None:
        """Update every parameter, or none where the scalar `skip` is not 0."""
        on_device = skip is not None and skip.device.type != "cpu" and all(map(_skips_on_device, self.optimizers))
        if skip is not None and not on_device and bool(skip):
            return
        for optimizer in self.optimizers:
            if on_device:
                # Fused optimizers leave parameters, moments and step counts alone where this is 1, without a wait.
                optimizer.found_inf = skip
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def averages(self) -> dict[nn.Parameter, Tensor]:
        """The weights to evaluate, export and keep, of the parameters that do not hold them while they train."""
        return {
            parameter: optimizer.average(parameter, group["config"].betas[0])
            for optimizer in self.optimizers
            if isinstance(optimizer, ScheduleFreeAdamW)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @contextmanager
    @torch.no_grad()
    def evaluation_weights(self) -> Iterator[None]:
        """Put the averages into the parameters for a while; then the very bits that were there before."""
        averages = self.averages()
        kept = {parameter: parameter.detach().clone() for parameter in averages}
        try:
            for parameter, average in averages.items():
                parameter.copy_(average)
            yield
        finally:
            for parameter, weight in kept.items():
                parameter.copy_(weight)

    def weights_changed(self) -> None:
        """Call when a new run takes its weights from elsewhere: what was derived from the old ones begins anew."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, ScheduleFreeAdamW):
                optimizer.weights_changed()

    def loaded(self) -> None:
        """Call when a load has written into `state`."""
        for optimizer in self.optimizers:
            if hasattr(optimizer, "loaded"):
                optimizer.loaded()


def _skips_on_device(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults.get("fused"))


def _class_name(optimizer: Any) -> str:
    """The class that does the work, as one would import it."""
    working = optimizer.inner if isinstance(optimizer, LowPrecisionStates) else optimizer
    kind = getattr(working, "inner_class", None) or type(working)
    return f"{kind.__module__}.{kind.__qualname__}"
