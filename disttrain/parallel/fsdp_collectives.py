"""FSDP2's two collectives as gloo does them fastest, and where each rank's own gradients can be seen on their way."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from disttrain.parallel.noise_probe import NoiseProbe

NO_TIMEOUT = timedelta(0)
"""torch's word for that of the process group."""


class AllOf(dist.Work):
    """Done when all of `works` are."""

    def __init__(self, works: Sequence[dist.Work | None]) -> None:
        super().__init__()
        self.works = works

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        return all(work.wait(timeout) for work in self.works if work is not None)


class BroadcastAllGather(DefaultAllGather):
    """Each rank broadcasts its piece: the same bytes as gloo's all-gather in a third to two thirds of its time.

    Never waits itself: FSDP2 does when it needs the weights, until when a block that is asked for early travels beside
    the one that computes. To FSDP2 that is what its streams are on a GPU.
    """

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        pieces = output_tensor.chunk(group.size())
        own = pieces[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():  # FSDP2 gathers in place
            own.copy_(input_tensor)
        return AllOf([dist.broadcast(p, group=group, group_src=r, async_op=True) for r, p in enumerate(pieces)])


class Exchange:
    """The one exchange of a model's units that may be under way."""

    def __init__(self) -> None:
        self.travelling: tuple[dist.Work, Tensor, Tensor] | None = None

    def arrive(self) -> None:
        if self.travelling is not None:
            (work, pieces, output), self.travelling = self.travelling, None
            work.wait()
            torch.sum(pieces, dim=0, out=output)


class ExchangeReduceScatter(DefaultReduceScatter):
    """Each rank sends the others their pieces and sums its own, in half the bytes: gloo's reduce-scatter is an
    all-reduce inside.

    `late`: a unit's pieces travel beside the backward of the next one. The sums are there when the next unit begins
    to reduce, or when the backward ends. Not where FSDP2 looks at them before: it has gradients to add them to, or
    hooks to call.
    """

    def __init__(self, exchange: Exchange, unit: FSDPModule, late: bool = False) -> None:
        self.exchange, self.unit, self.late = exchange, unit, late

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        if op != dist.ReduceOp.SUM:
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
        self.exchange.arrive()
        received = torch.empty_like(input_tensor)
        work = dist.all_to_all_single(received, input_tensor, group=group, async_op=True)
        assert work is not None
        self.exchange.travelling = work, received.view(group.size(), -1), output_tensor
        if self.late and not self._looked_at():
            # Called when the backward has ended, whoever started it.
            torch.autograd.Variable._execution_engine.queue_callback(self.exchange.arrive)
        else:
            self.exchange.arrive()
        return None

    def _looked_at(self) -> bool:
        group = self.unit._get_fsdp_state()._fsdp_param_group
        assert group is not None
        parameters = [held.sharded_param for held in group.fsdp_params]
        return any(p.grad is not None or p._post_accumulate_grad_hooks for p in parameters)


class ProbedReduceScatter(ReduceScatter):
    """Shows a rank's own gradients to `probe` before `inner` reduces them."""

    def __init__(self, inner: ReduceScatter, probe: NoiseProbe) -> None:
        self.inner, self.probe = inner, probe

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.inner.allocate(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        self.probe.add(input_tensor)
        return self.inner(output_tensor, input_tensor, *arguments, **named)


def set_collectives(units: Sequence[FSDPModule], on_gloo: bool, probe: NoiseProbe | None, late: bool = False) -> None:
    """What each unit gathers and reduces by; `probe` may look at the gradients, and `late` is as above.

    `units` in the order in which the model has them, best that of its forward: on gloo the next one is gathered while
    one computes. Streams do it on a GPU.
    """
    exchange = Exchange()
    for unit in units:
        inner = ExchangeReduceScatter(exchange, unit, late) if on_gloo else DefaultReduceScatter()
        reduce_scatter: ReduceScatter = ProbedReduceScatter(inner, probe) if probe else inner
        unit.set_custom_reduce_scatter(reduce_scatter)
    if on_gloo:
        for unit, following in zip(units, [*units[1:], None], strict=True):
            unit.set_custom_all_gather(BroadcastAllGather())
            unit.set_modules_to_forward_prefetch([following] if following else [])
