"""Hugging Face's Accelerate: it wraps the model in DDP or FSDP2 and calls the optimizer; everything else is ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from disttrain.config.parallel import ParallelConfig
from disttrain.engines.handed_over import HandedOver
from disttrain.engines.native import NativeEngine
from disttrain.engines.protocol import UpdateResult
from disttrain.errors import UserError
from disttrain.models import ShardingPlan
from disttrain.optim import OptimizerSet, Safeguards
from disttrain.optim.sharding import world_size
from disttrain.parallel import NoiseProbe
from disttrain.parallel.ddp import sum_over_replicas
from disttrain.parallel.fsdp import reduce_dtype, sum_gradients
from disttrain.parallel.precision import DTYPES, CastParameters


@dataclass(frozen=True)
class Prepared:
    """What `Accelerator.prepare` made: `model` is called, `optimizer` calls `handed`."""

    accelerator: Any
    model: nn.Module
    optimizer: Any
    handed: HandedOver


def apply_accelerate(
    model: nn.Module, mesh: DeviceMesh, config: ParallelConfig, plan: ShardingPlan, probe: NoiseProbe | None
) -> Prepared:
    """Prepare `model`, with its initial weights, on the process group that is there. Collective.

    Gradients are summed, never averaged; computing types are ours, so that all engines round alike. Raises UserError
    where Accelerate does not see the processes that there are.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    cpu = mesh.device_type == "cpu"
    plugin = _fsdp_plugin(model, config, plan) if config.shards else None
    # A plugin, since a number would give way to what a launcher has said.
    whole = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_plugin=whole, fsdp_plugin=plugin)
    if accelerator.num_processes != world_size():
        raise UserError(
            f"accelerate sees {accelerator.num_processes} processes where there are {world_size()}: start with "
            "disttrain train --nproc, torchrun or accelerate launch"
        )
    if plugin is not None:
        _insist_on_fsdp(accelerator, plugin)
    handed = HandedOver([parameter for parameter in model.parameters() if parameter.requires_grad])
    dtype = DTYPES[config.param_dtype]
    called = CastParameters(model, dtype) if dtype and not config.shards else model
    prepared, optimizer = accelerator.prepare(called, handed)
    if isinstance(prepared, DistributedDataParallel):
        sum_over_replicas(prepared, mesh["dp_replicate"].get_group(), DTYPES[config.reduce_dtype], probe)
    elif plugin is not None:
        if not isinstance(prepared, FSDPModule):
            raise RuntimeError("accelerate has not sharded the model that it was asked to shard")
        sum_gradients(model, mesh, probe)
    return Prepared(accelerator, prepared, optimizer, handed)


def _fsdp_plugin(model: nn.Module, config: ParallelConfig, plan: ShardingPlan) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=config.reshard_after_forward is not False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({type(unit).__name__ for unit in plan.units(model)}),
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=DTYPES[config.param_dtype], reduce_dtype=reduce_dtype(config), cast_forward_inputs=False
        ),
        cpu_ram_efficient_loading=False,
        cpu_offload=config.cpu_offload,
    )


def _insist_on_fsdp(accelerator: Any, plugin: Any) -> None:
    """Accelerate 1.15 turns FSDP on only where it has found GPUs, and wraps in DDP elsewhere without a word."""
    from accelerate.utils import DistributedType

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


class AccelerateEngine(NativeEngine):
    """`module` owns the parameters of `optimizer`; both steps and backwards go through Accelerate."""

    def __init__(
        self,
        module: nn.Module,
        prepared: Prepared,
        optimizer: OptimizerSet,
        *,
        parallel: ParallelConfig,
        device: torch.device,
        safeguards: Safeguards,
        probe: NoiseProbe | None = None,
    ) -> None:
        super().__init__(
            module, prepared.model, optimizer, parallel=parallel, device=device, safeguards=safeguards, probe=probe
        )
        self.prepared = prepared
        outer = type(prepared.optimizer)
        for group in optimizer.param_groups:
            group["class"] += f" in {outer.__module__}.{outer.__qualname__}"

    def _backward(self, loss: Tensor) -> None:
        self.prepared.accelerator.backward(loss)

    def finish_step(self, lr_factor: float | Sequence[float], loss: Tensor | None = None) -> UpdateResult:
        result = self.prepared.handed.run(self.prepared.optimizer.step, lambda: self._update(lr_factor, loss))
        if result is None:
            raise RuntimeError("Accelerate has not called its optimizer in a step")
        return result
