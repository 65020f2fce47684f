"""What ranks do in test_beside.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from disttrain.config import ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.parallel.fsdp_collectives import ExchangeReduceScatter
from disttrain.testing.parity import LENGTH, MODELS
from disttrain.train.build import build_model
from tests.parallel.grad_sync_jobs import engine_of, rank_loss, whole_gradients


def order_of_gathers(rank: int, world: int, settings: dict[str, Any]) -> list[str]:
    """When units are asked for and blocks compute, in a forward."""
    engine, seen, broadcast = engine_of(world, settings), list[str](), dist.broadcast

    def noted(*arguments: Any, **named: Any) -> Any:
        if named["group_src"] == 0:
            seen.append("gather")
        return broadcast(*arguments, **named)

    for block in engine.module.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append("compute"))
    with mock.patch.object(dist, "broadcast", noted):
        rank_loss(engine.model, rank)
    return seen


def late_and_punctual(rank: int, world: int) -> tuple[bool, bool, float]:
    """Whether sums travel while the next block goes backward, whether any does afterwards, and by how much gradients
    differ from those that were waited for."""
    engine = engine_of(world, {"strategy": "zero1"})
    units = [module for module in engine.module.modules() if isinstance(module, FSDPModule)]
    gradients, travelling = [], list[bool]()
    for late in (True, False):
        exchange = ExchangeReduceScatter(late)
        for unit in units:
            unit.set_custom_reduce_scatter(exchange)
        hook = engine.module.blocks[0].register_full_backward_pre_hook(
            lambda *_, exchange=exchange: travelling.append(exchange._travelling is not None)
        )
        rank_loss(engine.model, rank).backward()
        hook.remove()
        travelling.append(exchange._travelling is not None)
        gradients.append(whole_gradients(engine.module))
        for parameter in engine.module.parameters():
            parameter.grad = None
    during, after, *punctual = travelling
    assert punctual == [False, False]
    late_ones, expected = gradients
    return during, after, max((late_ones[name] - expected[name]).abs().max().item() for name in expected)


def may_be_late(rank: int, world: int, settings: dict[str, Any], dtype: str) -> bool:
    """Of a model with weights of `dtype`."""
    parallel = ParallelConfig(**settings)
    dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
    gpt, _ = build_model(
        MODELS["gpt2"],
        max_length=LENGTH,
        mesh=build_mesh(dims, "cpu"),
        parallel=parallel,
        seed=0,
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype),
    )
    found = {
        group._reduce_scatter_comm.late
        for module in gpt.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    }
    (late,) = found
    return late
