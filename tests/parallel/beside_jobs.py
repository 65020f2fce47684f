"""What ranks do in test_beside.py."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from disttrain.config import ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.models import ShardingPlan
from disttrain.optim.sharding import local
from disttrain.parallel import parameters_will_change
from disttrain.parallel.fsdp import apply_fsdp
from disttrain.parallel.fsdp_collectives import Exchange, ExchangeReduceScatter
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
        exchange = Exchange()
        for unit in units:
            unit.set_custom_reduce_scatter(ExchangeReduceScatter(exchange, unit, late))
        hook = engine.module.blocks[0].register_full_backward_pre_hook(
            lambda *_, exchange=exchange: travelling.append(exchange.travelling is not None)
        )
        rank_loss(engine.model, rank).backward()
        hook.remove()
        travelling.append(exchange.travelling is not None)
        gradients.append(whole_gradients(engine.module))
        for parameter in engine.module.parameters():
            parameter.grad = None
    during, after, *punctual = travelling
    assert punctual == [False, False]
    late_ones, expected = gradients
    return during, after, max((late_ones[name] - expected[name]).abs().max().item() for name in expected)


def may_be_late(rank: int, world: int, settings: dict[str, Any], dtype: str) -> bool:
    """Of a model with weights of `dtype`."""
    gpt = engine_of(world, settings, getattr(torch, dtype)).module
    found = {
        module._get_fsdp_state()._fsdp_param_group._reduce_scatter_comm.late
        for module in gpt.modules()
        if isinstance(module, FSDPModule)
    }
    (late,) = found
    return late


class Net(nn.Module):
    """Three blocks, called in the order `order`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(7, 7, dtype=torch.float64) for _ in range(3))
        self.order = (0, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = torch.tanh(self.blocks[index](x)) + x
        return x


def sharded_net(world: int, settings: dict[str, Any]) -> tuple[Net, Net]:
    """The same weights cut and whole."""
    torch.manual_seed(0)
    net, parallel = Net(), ParallelConfig(**settings)
    whole = copy.deepcopy(net)
    dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
    apply_fsdp(net, build_mesh(dims, "cpu"), ShardingPlan(("blocks.*",), {}, ()), parallel)
    return net, whole


def numbers_of(rank: int, turn: int = 0) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * turn + rank), dtype=torch.float64)


def accumulated_by_hand(rank: int, world: int, settings: dict[str, Any]) -> float:
    """Two backwards of a model that nobody told of microbatches: how far its gradients are from the sums."""
    net, whole = sharded_net(world, settings)
    for turn in range(2):
        net(numbers_of(rank, turn)).square().sum().backward()
        for other in range(world):
            whole(numbers_of(other, turn)).square().sum().backward()
    pairs = zip(net.parameters(), whole.parameters(), strict=True)
    return max((p.grad.full_tensor() - expected.grad).abs().max().item() for p, expected in pairs)  # type: ignore[union-attr, operator]


def seen_by_hooks(rank: int, world: int) -> float:
    """How far what a hook sees of a gradient is from what there is after the backward."""
    net, _ = sharded_net(world, {"strategy": "zero1"})
    seen: dict[nn.Parameter, Tensor] = {}
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.update({p: local(p.grad).clone()}))
    net(numbers_of(rank)).square().sum().backward()
    assert len(seen) == 6
    return max((local(p.grad) - early).abs().sum().item() for p, early in seen.items())


def left_pending(rank: int, world: int, settings: dict[str, Any], raises: bool) -> float:
    """What a model adds to its input whose weights became zero after a forward that had asked for some and not come to
    them."""
    net, _ = sharded_net(world, settings)
    failing = net.blocks[0].register_forward_hook(_fail) if raises else None
    net.order = (0, 1, 2) if raises else (0, 2)
    with torch.no_grad(), suppress(RuntimeError):
        net(numbers_of(rank))
    if failing is not None:
        failing.remove()
    parameters_will_change(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.order = (0, 1, 2)
        return (net(numbers_of(rank)) - numbers_of(rank)).abs().max().item()


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")
