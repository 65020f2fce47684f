"""From groups of parameters to what a matrix optimizer works on: matrices, plans, traffic and owners' state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.config.matrix_groups import ExchangeConfig, MatrixGroup
from disttrain.errors import UserError
from disttrain.optim.matrix_exchange import MatrixExchange
from disttrain.optim.matrix_layout import Layout, layout_key, layout_of, regions_of
from disttrain.optim.matrix_plan import Box, MatrixUnit, build_plan, spread_pays
from disttrain.optim.matrix_split import blocks_of, matrix_problems
from disttrain.optim.matrix_updates import MatrixUpdate, matrix_update
from disttrain.optim.muon import State, lr_scale

Settings = dict[str, Any]
_FLOPS_PER_SECOND = {"cuda": 4e14, "cpu": 5e10}
_BYTES_PER_SECOND = {"cuda": 2.5e10, "cpu": 1e9}


@dataclass(frozen=True)
class Matrix:
    """A parameter or a block of one, with what this process holds of it."""

    parameter: nn.Parameter
    group: Settings
    update: MatrixUpdate
    name: str
    """That of the parameter; blocks are counted behind a #."""
    regions: tuple[Box, ...]
    """What each shard of a copy holds of it, in its own coordinates."""
    shape: tuple[int, int]
    held: tuple[slice, slice]
    """Within this process's shard of the parameter."""
    scale: float
    """What the direction is multiplied by."""

    @property
    def state_suffix(self) -> str:
        return "." + self.name.rpartition("#")[2] if "#" in self.name else ""


@dataclass(frozen=True)
class MatrixSet:
    """Matrices that lie alike and travel in the same type; matrices and `states` in the order of the plan's units."""

    exchange: MatrixExchange
    matrices: tuple[Matrix, ...]
    states: tuple[State, ...]
    """What this process keeps as an owner, as local tensors; empty for other owners' matrices."""
    entries: tuple[State, ...]
    """The same as all processes see it, under the keys of `torch.optim`'s state."""
    note: str
    """Why copies of the model share the computation or do not; empty where there is one copy."""


def build_matrix_sets(
    groups: Sequence[Settings], names: Mapping[nn.Parameter, str], settings: ExchangeConfig
) -> list[MatrixSet]:
    """One for each layout and type on the wire. Collective; raises UserError for what cannot be done."""
    layouts: dict[object, Layout] = {}
    alike: dict[tuple[object, torch.dtype], list[Matrix]] = {}
    for group in groups:
        config: MatrixGroup = group["config"]
        shapes = {names[parameter]: parameter.shape for parameter in group["params"]}
        if problems := list(matrix_problems(config, shapes)):
            raise UserError(problems)
        updates: dict[tuple[torch.dtype, torch.device], MatrixUpdate] = {}
        for parameter in group["params"]:
            blocks = blocks_of(names[parameter], parameter.shape, config)
            key = layout_key(parameter)
            if key not in layouts:
                layouts[key] = layout_of(parameter)
            layout = layouts[key]
            kind = (parameter.dtype, layout.device)
            update = updates[kind] = updates.get(kind) or matrix_update(config, *kind)
            regions = regions_of(parameter, layout)
            for number, block in enumerate(blocks):
                name = f"{names[parameter]}#{number}" if len(blocks) > 1 else names[parameter]
                matrix = Matrix(
                    parameter,
                    group,
                    update,
                    name,
                    regions=tuple(region.within(block) for region in regions),
                    shape=block.sizes,
                    held=block.within(regions[layout.shard]).slices,
                    scale=lr_scale(config.lr_scale, *block.sizes),
                )
                alike.setdefault((key, _wire_dtype(config, update, parameter.dtype)), []).append(matrix)
    return [_matrix_set(layouts[key], wire, matrices, settings) for (key, wire), matrices in alike.items()]


def _matrix_set(layout: Layout, wire: torch.dtype, matrices: list[Matrix], settings: ExchangeConfig) -> MatrixSet:
    units = [_unit(matrix) for matrix in matrices]
    spread, note = _spread(units, layout, wire.itemsize, settings)
    plan = build_plan(
        units,
        shards=layout.shards,
        replicas=layout.replicas,
        spread=spread,
        element_bytes=wire.itemsize,
        bucket_bytes=settings.bucket_bytes,
    )
    exchange = MatrixExchange(plan, layout, wire)
    owners = {unit: owner for bucket in plan.buckets for unit, owner in zip(bucket.units, bucket.owners, strict=True)}
    held = [_owner_state(matrix, layout, *plan.place(owners[index])) for index, matrix in enumerate(matrices)]
    states, entries = zip(*held, strict=True)
    return MatrixSet(exchange, tuple(matrices), states, entries, note)


def _unit(matrix: Matrix) -> MatrixUnit:
    config = matrix.group["config"]
    settings = f"{config.algorithm}, {config.describe()}"
    return MatrixUnit(matrix.name, matrix.shape, matrix.regions, matrix.update.flops(*matrix.shape), settings)


def _spread(units: list[MatrixUnit], layout: Layout, element_bytes: int, settings: ExchangeConfig) -> tuple[bool, str]:
    if layout.replicas == 1 or settings.replicas != "auto":
        return layout.replicas > 1 and settings.replicas == "spread", ""
    kind = layout.device.type
    flops = settings.flops_per_second or _FLOPS_PER_SECOND.get(kind, _FLOPS_PER_SECOND["cuda"])
    bandwidth = settings.bytes_per_second or _BYTES_PER_SECOND.get(kind, _BYTES_PER_SECOND["cuda"])
    pays, why = spread_pays(units, layout.shards, layout.replicas, element_bytes, flops, bandwidth)
    return pays, f"copies of the model {'share' if pays else 'do not share'} the computation: {why}"


def _owner_state(matrix: Matrix, layout: Layout, copy: int | None, shard: int) -> tuple[State, State]:
    """This process's own tensors where it is the owner; and the entries that every process has."""
    parameter, update, sizes = matrix.parameter, matrix.update, matrix.shape
    shapes = update.initial_state(torch.empty(sizes, dtype=parameter.dtype, device="meta"))
    state: State = {}
    if shapes and shard == layout.shard and copy in (None, layout.replica):
        state = update.initial_state(torch.zeros(sizes, dtype=parameter.dtype, device=layout.device))
        if elsewhere := [key for key, value in state.items() if value.device != layout.device]:
            raise UserError(
                f"{matrix.name}: initial_state makes {', '.join(elsewhere)} on another device than that of the matrix, "
                f"{layout.device}: use matrix.new_zeros"
            )
    entries: dict[str, Tensor] = {
        key + matrix.state_suffix: layout.owned(state.get(key), like.shape, like.dtype, copy, shard)
        for key, like in shapes.items()
    }
    return state, entries


def _wire_dtype(config: MatrixGroup, update: MatrixUpdate, parameter_dtype: torch.dtype) -> torch.dtype:
    if config.wire_dtype == "bf16":
        return torch.bfloat16
    return (update.wire_dtype or parameter_dtype) if config.wire_dtype == "auto" else parameter_dtype
