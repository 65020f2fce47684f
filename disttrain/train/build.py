"""From a config to the parts of a run: straight-line calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from disttrain.config import ModelConfig, RunConfig
from disttrain.config.deepspeed import ds_config
from disttrain.config.parallel import ParallelConfig
from disttrain.data.loader import BatchLoader, SampleOrder
from disttrain.data.source import Data
from disttrain.distributed.env import Ranks
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import Engine, NativeEngine
from disttrain.models import GPT, GPT_PLAN, init_parameters
from disttrain.optim import OptimizerSet, Safeguards, build_optimizer, build_safeguards
from disttrain.optim.batch_law import BatchLaw, GroupLaw, group_rule
from disttrain.parallel import NoiseProbe, parallelize
from disttrain.parallel.parallelize import prepare_blocks
from disttrain.schedule import BatchSchedule


@dataclass(frozen=True)
class Training:
    """What a loop needs: `model` is the parallel module that is called, `gpt` the one with the trained parameters."""

    gpt: nn.Module
    model: nn.Module
    engine: Engine
    optimizer: OptimizerSet
    safeguards: Safeguards
    order: SampleOrder
    loader: BatchLoader


def build_training(config: RunConfig, data: Data, ranks: Ranks, device: torch.device) -> Training:
    """Model, optimizer, engine and loader of this rank, on the process group that is there. Collective."""
    dims = config.dims(ranks.world)
    mesh = build_mesh(dims, device.type)
    probe = NoiseProbe(config.parallel, dims) if config.monitor.noise_scale_every else None
    place = {"native": _native, "deepspeed": _deepspeed, "accelerate": _accelerate}[config.engine]
    placed = place(config, mesh, device, probe)
    optimizer = build_optimizer(placed.module, config.optim, GPT_PLAN, seed=config.train.seed)
    safeguards = build_safeguards(
        placed.module,
        optimizer,
        config.optim,
        GPT_PLAN,
        device=device,
        steps=config.train.total_steps,
        anomaly=config.resilience.anomaly,
    )
    engine = placed.engine(optimizer, safeguards)
    order = SampleOrder(data.train, config.train.sequence_length, config.train.seed)
    loader = BatchLoader(order, config.train.microbatch_size, ranks.rank, ranks.world)
    return Training(placed.module, placed.model, engine, optimizer, safeguards, order, loader)


@dataclass(frozen=True)
class _Placed:
    """A model where its engine wants it: `module` owns what is trained, `model` is called."""

    module: nn.Module
    model: nn.Module
    engine: Callable[[OptimizerSet, Safeguards], Engine]


def _native(config: RunConfig, mesh: DeviceMesh, device: torch.device, probe: NoiseProbe | None) -> _Placed:
    gpt, model = build_model(
        config.model,
        max_length=config.train.sequence_length,
        mesh=mesh,
        parallel=config.parallel,
        seed=config.train.seed,
        device=device,
        probe=probe,
    )

    def engine(optimizer: OptimizerSet, safeguards: Safeguards) -> Engine:
        where = _of_gradients(config, device)
        return NativeEngine(
            gpt, model, optimizer, parallel=config.parallel, device=where, safeguards=safeguards, probe=probe
        )

    return _Placed(gpt, model, engine)


def _deepspeed(config: RunConfig, mesh: DeviceMesh, device: torch.device, probe: NoiseProbe | None) -> _Placed:
    from disttrain.engines.deepspeed import DeepSpeedEngine, apply_deepspeed

    parallel = config.parallel
    gpt = _whole_gpt(config, device)
    prepare_blocks(gpt, parallel, GPT_PLAN)
    translated = ds_config(config, mesh.size())
    offloads = config.deepspeed.offload_optimizer != "none"
    zero = apply_deepspeed(gpt, mesh["dp_shard"], parallel, translated, partial(_whole_gpt, config))

    def engine(optimizer: OptimizerSet, safeguards: Safeguards) -> Engine:
        # The loss scale lies where the gradients are.
        where = torch.device("cpu") if offloads else device
        return DeepSpeedEngine(zero, gpt, optimizer, parallel=parallel, device=where, safeguards=safeguards)

    return _Placed(zero.module, zero.engine, engine)


def _accelerate(config: RunConfig, mesh: DeviceMesh, device: torch.device, probe: NoiseProbe | None) -> _Placed:
    from disttrain.engines.accelerate import AccelerateEngine, apply_accelerate

    gpt = _whole_gpt(config, device)
    prepare_blocks(gpt, config.parallel, GPT_PLAN)
    prepared = apply_accelerate(gpt, mesh, config.parallel, GPT_PLAN, probe)

    def engine(optimizer: OptimizerSet, safeguards: Safeguards) -> Engine:
        where = _of_gradients(config, device)
        return AccelerateEngine(
            gpt, prepared, optimizer, parallel=config.parallel, device=where, safeguards=safeguards, probe=probe
        )

    return _Placed(gpt, prepared.model, engine)


def _of_gradients(config: RunConfig, device: torch.device) -> torch.device:
    """Where FSDP2 and DDP leave gradients, and so where the loss scale lies."""
    return torch.device("cpu") if config.parallel.cpu_offload else device


def _whole_gpt(config: RunConfig, device: torch.device) -> GPT:
    """For engines that cut a model which is there already: with its initial weights, on a device that can hold them."""
    gpt = build_gpt(config.model, config.train.sequence_length, device)
    gpt.loss_chunk_tokens = config.parallel.loss_chunk_tokens
    if device.type != "meta":
        init_parameters(gpt, config.train.seed)
    return gpt


def build_batch_law(config: RunConfig, optimizer: OptimizerSet, batches: BatchSchedule) -> BatchLaw:
    """How each group's rate goes over the run, and what the batch makes of its settings."""
    schedules = {
        group.name: schedule
        for group, schedule in zip(config.optim.resolved_groups, config.lr_schedules(batches), strict=True)
    }
    laws = [
        GroupLaw(schedules[group["name"]], group_rule(group["config"], group["config"].schedule, config.schedule))
        for group in optimizer.param_groups
    ]
    sizes = [stage.samples * batches.sequence_length for stage in batches.stages]
    if config.train.batch_auto is not None:
        sizes.append(config.train.global_batch_tokens)
    return BatchLaw(optimizer, laws, config.schedule, sizes)


def build_model(
    config: ModelConfig,
    *,
    max_length: int,
    mesh: DeviceMesh,
    parallel: ParallelConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    probe: NoiseProbe | None = None,
) -> tuple[GPT, nn.Module]:
    """The GPT with its initial weights, cut over `mesh` as `parallel` says; and the module to call in its place."""
    gpt = build_gpt(config, max_length, torch.device("meta"), dtype)
    gpt.loss_chunk_tokens = parallel.loss_chunk_tokens

    def materialise(module: nn.Module) -> None:
        module.to_empty(device="cpu" if parallel.cpu_offload else device)
        gpt.tie_weights()
        init_parameters(gpt, seed)

    return gpt, parallelize(gpt, mesh, parallel, GPT_PLAN, materialise, probe)


def build_gpt(config: ModelConfig, max_length: int, device: torch.device, dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT on one device, with whatever torch left in its parameters."""
    with device:
        return GPT(config, max_length).to(dtype)
