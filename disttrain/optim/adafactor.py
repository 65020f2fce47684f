"""Adafactor on shards: row means are local, the rest crosses the ranks in two packed all-reduces a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from disttrain.optim.sharding import copies, like_sharded, local


class Adafactor(torch.optim.Optimizer):
    """Shazeer and Stern, arXiv 1804.04235, algorithms 4 and 5, with decoupled decay; torch's fails on DTensors.

    State of a matrix [A, B]: `row` [A], cut as the matrix is, and `column` [B], whole on every rank. Anything else has
    `exp_avg_sq` of its own shape. The packed sums are those of all groups, in the order of the parameters.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _initial_state(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        members = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not members:
            return
        units = [_Unit(parameter, group, self.state[parameter]) for parameter, group in members]
        first = _dist_sums([(unit.first_sums(), unit.parameter) for unit in units])
        for unit, sums in zip(units, first, strict=True):
            unit.use_first(sums)
        second = _dist_sums([(unit.second_sums(), unit.parameter) for unit in units])
        for unit, sums in zip(units, second, strict=True):
            unit.use_second(sums)


class _Unit:
    """One parameter in one step; its gradient's memory becomes the update."""

    def __init__(self, parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        assert parameter.grad is not None
        self.parameter, self.state, self.config, self.lr = parameter, state, group["config"], group["lr"]
        self.weight, self.update = local(parameter), local(parameter.grad)
        self.factored = "row" in state
        state["step"] += 1
        self.step = int(state["step"])
        self.beta2 = 1 - self.step**self.config.beta2_decay

    def first_sums(self) -> Tensor:
        """This rank's part of sum(W^2), and of a matrix also of sum(R) and of the columns' sums of G^2 + eps1."""
        squares = self.update.square() + self.config.eps1
        weight_squares = self.weight.square().sum().reshape(1)
        if not self.factored:
            local(self.state["exp_avg_sq"]).lerp_(squares, 1 - self.beta2)
            return weight_squares
        row = local(self.state["row"])
        row.lerp_(squares.mean(dim=1), 1 - self.beta2)
        return torch.cat([weight_squares, row.sum().reshape(1), squares.sum(dim=0)])

    def use_first(self, sums: Tensor) -> None:
        """Divide the gradient by the root of its second moment."""
        count = self.parameter.numel()
        self.weight_rms = (sums[0] / count).sqrt()
        if self.factored:
            rows = self.parameter.shape[0]
            column = local(self.state["column"])
            column.lerp_(sums[2:].to(column) / rows, 1 - self.beta2)
            # Each factor has its own root: their product would underflow in fp32 where gradients are zero.
            self.update.mul_((local(self.state["row"]) / (sums[1] / rows)).rsqrt()[:, None].to(self.update))
            self.update.mul_(column.rsqrt())
        else:
            self.update.mul_(local(self.state["exp_avg_sq"]).rsqrt())

    def second_sums(self) -> Tensor:
        return self.update.square().sum().reshape(1)

    def use_second(self, sums: Tensor) -> None:
        """Bound the update's root mean square, and take a step relative to the weight's."""
        update_rms = (sums[0] / self.parameter.numel()).sqrt()
        relative = min(self.lr, self.step**-0.5)
        length = relative * self.weight_rms.clamp(min=self.config.eps2)
        self.weight.mul_(1 - self.lr * self.config.weight_decay)
        self.weight.sub_(
            self.update.mul_((length / (update_rms / self.config.clip_threshold).clamp(min=1.0)).to(self.update))
        )


def _dist_sums(parts: list[tuple[Tensor, nn.Parameter]]) -> list[Tensor]:
    """Each part summed over the ranks that hold the parameter's shards; one all-reduce, none where nothing is cut."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    counts = [copies(parameter, world) for _, parameter in parts]
    if all(count == world for count in counts):
        return [part for part, _ in parts]
    packed = torch.cat([part / count for (part, _), count in zip(parts, counts, strict=True)])
    dist.all_reduce(packed)
    return list(packed.split([part.numel() for part, _ in parts]))


def _initial_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float64)
    if parameter.dim() != 2:
        return {"step": step, "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False)}
    whole, held = parameter.shape, local(parameter).detach()
    row, column = held.new_zeros(held.shape[0]), held.new_zeros(whole[1])
    if not isinstance(parameter, DTensor):
        return {"step": step, "row": row, "column": column}
    mesh = parameter.device_mesh
    return {
        "step": step,
        "row": like_sharded(row, parameter, whole[:1]),
        "column": DTensor.from_local(column, mesh, [Replicate()] * mesh.ndim, run_check=False),
    }
