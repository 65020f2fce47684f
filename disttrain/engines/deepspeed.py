"""DeepSpeed's ZeRO: it cuts, reduces and gathers; clipping and the update are ours, on the runs that it leaves us."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from disttrain.checkpoint.state import model_state
from disttrain.config.parallel import ParallelConfig
from disttrain.engines.deepspeed_start import initialize
from disttrain.engines.fragments import RowState, fragment, set_gradients, with_fragments
from disttrain.engines.handed_over import HandedOver
from disttrain.engines.native import NativeEngine
from disttrain.engines.protocol import UpdateResult
from disttrain.engines.swapped import check_buffers, let_go, look_after_disk, write_parameters_as_they_are
from disttrain.optim import GradientNorms, OptimizerSet, Safeguards
from disttrain.optim.anomaly import Verdict
from disttrain.optim.sharding import flat, local, world_size
from disttrain.parallel.precision import DTYPES, CastParameters
from disttrain.parallel.replicas import weight_sums


@dataclass(frozen=True)
class ZeroModel:
    """A model that DeepSpeed has taken: `engine` is called, `module` has the parameters that are updated."""

    engine: Any
    module: nn.Module
    handed: HandedOver
    mesh: DeviceMesh
    stage: int


def apply_deepspeed(
    model: nn.Module,
    mesh: DeviceMesh,
    parallel: ParallelConfig,
    ds_config: dict[str, Any],
    build: Callable[[torch.device], nn.Module],
) -> ZeroModel:
    """Hand `model`, with its initial fp32 weights, over to DeepSpeed on the process group that is there. Collective.

    `build` makes the model again, on the meta device without values or on another one with the same initial weights:
    DeepSpeed rounds to bf16 and fp16 before it copies the fp32 weights that are trained.
    """
    handed = HandedOver([parameter for parameter in model.parameters() if parameter.requires_grad])
    section, dtype = ds_config["zero_optimization"], DTYPES[parallel.param_dtype]
    stage, on_disk = section["stage"], section.get("offload_param", {}).get("device") == "nvme"
    if on_disk:
        sizes = [parameter.numel() for parameter in model.parameters()]
        check_buffers(sizes, mesh.size(), (dtype or torch.float32).itemsize, section)
        write_parameters_as_they_are()
    # Stage 0 leaves weights in fp32 and casts nothing, as DDP.
    engine = initialize(CastParameters(model, dtype) if dtype and not stage else model, handed, ds_config)
    if stage == 0:
        return ZeroModel(engine, model, handed, mesh, stage)
    if on_disk:
        look_after_disk(model, engine.optimizer)
    module = with_fragments(build(torch.device("meta")), _fragments(engine, model, mesh))
    zero = ZeroModel(engine, module, handed, mesh, stage)
    if dtype:
        exact = dict(build(torch.device("cpu")).named_parameters())
        for name, parameter in module.named_parameters():
            held, run = flat(parameter), local(parameter).detach()
            assert held is not None
            run.copy_(exact[name].detach().reshape(-1)[held.first : held.first + run.numel()])
    return zero


def _fragments(engine: Any, model: nn.Module, mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    """This rank's run of the fp32 copy of each parameter, in DeepSpeed's own memory."""
    held = _runs_of_stage_3 if engine.zero_optimization_stage() == 3 else _runs_of_stages_1_and_2
    found = {}
    for name, parameter in model.named_parameters():
        run, first = held(engine.optimizer, parameter)
        found[name] = fragment(run, getattr(parameter, "ds_shape", parameter.shape), first, mesh)
    return found


def _runs_of_stages_1_and_2(optimizer: Any, parameter: Any) -> tuple[Tensor, int]:
    mapping = parameter._hp_mapping
    if mapping is None:
        return _partitions(optimizer)[0].detach()[:0], 0
    return mapping.hp_fragment, mapping.lp_fragment_address.start


def _runs_of_stage_3(optimizer: Any, parameter: Any) -> tuple[Tensor, int]:
    """Every rank has the same number of elements, the last ones padding."""
    part, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
    first = min(optimizer._get_param_partition_rank(parameter) * count, parameter.ds_numel)
    held = min(count, parameter.ds_numel - first)
    return _partitions(optimizer)[part].detach()[offset : offset + held], first


def _partitions(optimizer: Any) -> list[Tensor]:
    """The flat fp32 weights, with their gradients: one tensor, or several where parameters go to a disk in parts."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            partitions: list[Tensor] = getattr(optimizer, name)
            return partitions
    raise RuntimeError(f"{type(optimizer).__name__} keeps its weights where we do not know")


class DeepSpeedEngine(NativeEngine):
    """`zero.module` owns the parameters of `optimizer`: under stage 0 the model's, else runs of them.

    DeepSpeed averages over ranks, which the loss must not be; microbatches it is told not to average.
    """

    def __init__(
        self,
        zero: ZeroModel,
        gpt: nn.Module,
        optimizer: OptimizerSet,
        *,
        parallel: ParallelConfig,
        device: torch.device,
        safeguards: Safeguards,
    ) -> None:
        super().__init__(zero.module, zero.engine, optimizer, parallel=parallel, device=device, safeguards=safeguards)
        self.zero, self._gpt, self._world = zero, gpt, world_size()
        self._rows = RowState(zero.mesh)
        self._fragments = list(zero.module.parameters())
        outer = type(zero.engine.optimizer if zero.stage else zero.engine)
        for group in optimizer.param_groups:
            group["class"] += f" in {outer.__module__}.{outer.__qualname__}"

    def begin_step(self, measure_noise: bool, tokens: Sequence[int], compare_weights: bool = False) -> list[int]:
        self._rows.forget()
        return super().begin_step(measure_noise, tokens, compare_weights)

    def forward(self, tokens: Tensor, labels: Tensor, last: bool) -> Tensor:
        self.zero.engine.set_gradient_accumulation_boundary(last)
        loss = self.zero.engine(tokens, labels)
        if self._compare_weights and last:
            self._weight_sums = weight_sums(self._gpt.parameters())
        return loss

    def backward(self, loss: Tensor) -> None:
        self.zero.engine.backward(loss * (self.loss_scale.scale * self._world), scale_wrt_gas=False)

    def finish_step(self, lr_factor: float | Sequence[float], loss: Tensor | None = None) -> UpdateResult:
        def update() -> UpdateResult:
            if self.zero.stage:
                self._take_gradients()
            return self._update(lr_factor, loss)

        return self.zero.handed.run(self.zero.engine.step, update) or self._left_out()

    def _take_gradients(self) -> None:
        memory = {tensor.untyped_storage().data_ptr(): tensor for tensor in _partitions(self.zero.engine.optimizer)}
        gradients = []
        for run in map(local, self._fragments):
            partition = memory[run.untyped_storage().data_ptr()]
            offset = run.storage_offset() - partition.storage_offset()
            assert partition.grad is not None
            gradients.append(partition.grad[offset : offset + run.numel()])
        set_gradients(self._fragments, gradients)

    def _left_out(self) -> UpdateResult:
        """DeepSpeed has found gradients that are not finite, on whatever rank, and dropped them all."""
        groups = self.optimizer.param_groups
        infinite = torch.full_like(self.loss_scale.scale, torch.inf, dtype=torch.float64)
        norms = GradientNorms(
            total=infinite,
            parameters=infinite.expand(len(self._fragments)),
            groups=infinite.expand(len(groups)),
            scales=torch.ones_like(infinite).expand(len(groups)),
            shares=torch.zeros_like(infinite).expand(len(groups)),
        )
        skipped = torch.ones_like(self.loss_scale.scale)
        self.loss_scale.update(skipped)
        verdict = torch.full_like(skipped, Verdict.GRADIENT_NOT_FINITE, dtype=torch.int64)
        return UpdateResult(norms, skipped, verdict, self.loss_scale.scale, weight_sums=self._weight_sums)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        swapped = bool(self.zero.stage and self.optimizer.averages())
        self.zero.engine.eval()
        with self.optimizer.evaluation_weights():
            if swapped:
                self._dist_publish()
            yield
        if swapped:
            self._dist_publish()
        self.zero.engine.train()

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        return self._rows.dist_rows(self.module, state) if self.zero.stage else state

    def weights(self) -> dict[str, Tensor]:
        weights = model_state(self.module)
        return self._rows.dist_rows(self.module, weights) if self.zero.stage else weights

    def loaded(self) -> None:
        self._receive()
        super().loaded()

    def weights_changed(self) -> None:
        self._receive()
        super().weights_changed()

    def _receive(self) -> None:
        if self.zero.stage:
            # Kept until the next step: a rollback loads into them again where the first checkpoint was no good.
            self._rows.dist_write_back()
            self._dist_publish()

    def _dist_publish(self) -> None:
        """Give the fp32 weights to those that compute with them."""
        optimizer = self.zero.engine.optimizer
        if self.zero.stage < 3:
            optimizer.update_lp_params()
            return
        let_go(optimizer)
        for part in range(len(_partitions(optimizer))):
            optimizer._reassign_or_swap_out_partitioned_parameters(part)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
