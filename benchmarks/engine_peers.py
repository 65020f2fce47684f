"""Other people's engines on the model and batch of `engines.py`, each as its own documentation would have it.

All take the mean over the tokens of a rank's microbatches, average over ranks, clip by the norm of all gradients at 1,
and update by torch's fused AdamW with our preset's groups. With equally many tokens everywhere that is our step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from disttrain.config import ModelConfig, OptimConfig
from disttrain.models import GPT, GPT_PLAN, init_parameters
from disttrain.optim.param_groups import matching

Batch = Sequence[tuple[Tensor, Tensor]]
"""Microbatches of tokens and labels, [rows, length] each."""
CLIP_NORM = 1.0
SHARD_ALL = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""By default ZeRO-3 cuts no parameter below 100,000 elements and keeps up to a billion gathered: no model of this size
would be sharded while it computes, as FSDP's is."""


class Peer(Protocol):
    def step(self, batch: Batch) -> Tensor:
        """One update; the mean loss of this rank's microbatches."""
        ...


def plain_gpt(model: ModelConfig, length: int) -> GPT:
    """The weights that `build_model` gives, in one piece."""
    gpt = GPT(model, length)
    init_parameters(gpt, 0)
    return gpt


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """With the groups, rates and decay of our preset."""
    parameters, groups = dict(module.named_parameters()), []
    for group in OptimConfig().resolved_groups:
        names = {name for rule in group.match for name in matching(rule, list(parameters), GPT_PLAN.roles)}
        settings = {key: getattr(group, key) for key in ("lr", "betas", "eps", "weight_decay")}
        groups.append({"params": [parameters.pop(name) for name in sorted(names)], **settings})
    return torch.optim.AdamW(groups, fused=True)


def share(model: Callable[[Tensor, Tensor], Tensor], batch: Batch, index: int) -> Tensor:
    """One microbatch's part of the mean over a rank's batch: the model gives sums."""
    tokens, labels = batch[index]
    return model(tokens, labels) / labels.numel() / len(batch)


class PlainDDP:
    """PyTorch's DistributedDataParallel."""

    def __init__(self, gpt: GPT) -> None:
        self.model = DistributedDataParallel(gpt, gradient_as_bucket_view=True)
        self.optimizer = adamw(gpt)

    def step(self, batch: Batch) -> Tensor:
        total = torch.zeros(())
        for index in range(len(batch)):
            last = index == len(batch) - 1
            with nullcontext() if last else self.model.no_sync():
                loss = share(self.model, batch, index)
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class PlainFSDP2:
    """PyTorch's fully_shard on every block and on the root; `keep` keeps weights until the last backward."""

    def __init__(self, gpt: GPT, keep: bool = False, reduce_each: bool = True) -> None:
        self.keep, self.reduce_each = keep, reduce_each
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        settings = {"reshard_after_forward": False} if keep else {}
        for unit in (*gpt.blocks, gpt):
            fully_shard(unit, mesh=mesh, **settings)
        self.model = gpt
        self.optimizer = adamw(gpt)

    def step(self, batch: Batch) -> Tensor:
        assert isinstance(self.model, FSDPModule)
        total = torch.zeros(())
        for index in range(len(batch)):
            last = index == len(batch) - 1
            self.model.set_requires_gradient_sync(last or self.reduce_each)
            self.model.set_reshard_after_backward(last or not self.keep)
            loss = share(self.model, batch, index)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class DeepSpeed:
    """ZeRO of a stage, with the optimizer given to it."""

    def __init__(self, gpt: GPT, stage: int, batch: int, accumulation: int) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed("gloo", dist_init_required=False)
        config = {
            "train_micro_batch_size_per_gpu": batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": CLIP_NORM,
            "zero_optimization": {"stage": stage, **(SHARD_ALL if stage == 3 else {})},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed.initialize(model=gpt, optimizer=adamw(gpt), config=config, dist_init_required=False)

    def step(self, batch: Batch) -> Tensor:
        total = torch.zeros(())
        for tokens, labels in batch:
            loss = self.engine(tokens, labels) / labels.numel()
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / len(batch)
        return total


class Accelerate:
    """Accelerate, which is DDP on CPUs."""

    def __init__(self, gpt: GPT, accumulation: int) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.model, self.optimizer = self.accelerator.prepare(gpt, adamw(gpt))

    def step(self, batch: Batch) -> Tensor:
        total = torch.zeros(())
        for tokens, labels in batch:
            with self.accelerator.accumulate(self.model):
                loss = self.model(tokens, labels) / labels.numel()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach() / len(batch)
        return total


class Fabric:
    """Lightning Fabric with its DDP strategy, or with FSDP2 through its ModelParallelStrategy."""

    def __init__(self, gpt: GPT, sharded: bool) -> None:
        from lightning_fabric import Fabric as LightningFabric
        from lightning_fabric.plugins.environments import TorchElasticEnvironment
        from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

        place, world = {"cluster_environment": TorchElasticEnvironment()}, dist.get_world_size()
        strategy: Any = DDPStrategy(gradient_as_bucket_view=True, process_group_backend="gloo", **place)
        if sharded:
            strategy = ModelParallelStrategy(
                _fabric_plan, data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo"
            )
            strategy.cluster_environment = place["cluster_environment"]
        self.fabric = LightningFabric(accelerator="cpu", devices=world, strategy=strategy)
        self.fabric.launch()
        self.model = self.fabric.setup_module(gpt)
        self.optimizer = self.fabric.setup_optimizers(adamw(gpt))
        self.sharded = sharded

    def step(self, batch: Batch) -> Tensor:
        total = torch.zeros(())
        for index in range(len(batch)):
            accumulating = index < len(batch) - 1 and not self.sharded
            with self.fabric.no_backward_sync(self.model, enabled=accumulating):
                loss = share(self.model, batch, index)
                self.fabric.backward(loss)
            total += loss.detach()
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=CLIP_NORM, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def _fabric_plan(gpt: GPT, mesh: Any) -> GPT:
    for unit in (*gpt.blocks, gpt):
        fully_shard(unit, mesh=mesh["data_parallel"])
    return gpt
