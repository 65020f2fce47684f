"""The parity contract: any layout gives the gradients, norms and parameters of one naive process, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import Engine, NativeEngine, UpdateResult
from disttrain.models import GPT, GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.parallel import NoiseProbe
from disttrain.testing.pool import RankPool
from disttrain.testing.reference import reference_training
from disttrain.train.build import build_model
from disttrain.train.step import train_step

WORLDS = (1, 2, 4, 8)
STEPS = 3
ROWS = 24
"""Samples of a global batch: divides by every world and accumulation of the table."""
LENGTH = 7
GRADIENT_TOLERANCE = 1e-12
PARAMETER_TOLERANCE = 1e-10
"""AdamW divides by the root of the second moment: rounding in a tiny gradient is felt in full."""

MODELS = {
    # Widths that no world divides, and key/value matrices with two rows: fewer than ranks.
    "gpt2": ModelConfig(n_layers=2, d_model=10, n_heads=5, n_kv_heads=1, d_ff=41, vocab_size=53),
    "modern": ModelConfig(
        n_layers=2,
        d_model=10,
        n_heads=5,
        n_kv_heads=1,
        d_ff=27,
        vocab_size=53,
        position="rope",
        norm="rmsnorm",
        mlp="swiglu",
        qk_norm=True,
        bias=False,
        tie_embeddings=False,
    ),
}
OPTIM = OptimConfig(lr=1e-2, clip_norm=0.5, weight_decay=0.1)
_ZERO_GRADIENT = "*.wk.bias"
"""Softmax ignores what is added to all scores of a row, so a key bias without rope has a gradient of exactly zero:
its error is absolute, rounding has nothing to be relative to."""


@dataclass(frozen=True)
class ParityCase:
    """One cell of the table."""

    parallel: ParallelConfig
    accumulation: int
    model: str

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.parallel.strategy, self.parallel.grad_accumulation)))


@dataclass(frozen=True)
class ParityRow:
    """What one cell measured of one quantity, over all tensors and steps."""

    strategy: str
    world: int
    case: str
    quantity: Literal["gradients", "parameters"]
    """`gradients`: those of every step before clipping, and their norms; `parameters`: after the last step."""
    max_relative_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.max_relative_error <= self.tolerance

    def contract(self) -> dict[str, Any]:
        """The row as `verify --json` prints it."""
        named = {name: getattr(self, name) for name in ("strategy", "world", "max_relative_error", "tolerance")}
        return {**named, "case": f"{self.case}, {self.quantity}", "passed": self.passed}


def parity_cases(world: int) -> Iterator[ParityCase]:
    """Every strategy with both settings of accumulation; hsdp as two copies of the model, from four processes on."""
    layouts = [ParallelConfig(strategy=strategy) for strategy in ("ddp", "zero1", "zero2")]
    for grad_accumulation in ("sharded", "unsharded"):
        layouts.append(ParallelConfig(strategy="fsdp", grad_accumulation=grad_accumulation))
        if world >= 4:
            layouts.append(ParallelConfig(strategy="hsdp", dp_replicate=2, grad_accumulation=grad_accumulation))
    # Eight processes share few cores: there each accumulation meets one of the models.
    combinations = product(MODELS, (1, 3)) if world < 8 else (("gpt2", 1), ("modern", 3))
    for parallel, (model, accumulation) in product(layouts, combinations):
        yield ParityCase(parallel, accumulation, model)


def parity_table(pool: RankPool, worlds: tuple[int, ...] = WORLDS) -> Iterator[ParityRow]:
    """Run every case on every world; each gives a row for its gradients and one for its final parameters."""
    for world in worlds:
        for case in parity_cases(world):
            job = "disttrain.testing.parity:parity_job"
            gradients, parameters = pool.run(job, world, device=pool.device, case=case)[0]
            name = f"{case.model}, accumulation {case.accumulation}"
            yield ParityRow(case.label, world, name, "gradients", gradients, GRADIENT_TOLERANCE)
            yield ParityRow(case.label, world, name, "parameters", parameters, PARAMETER_TOLERANCE)


def parity_job(rank: int, world: int, device: str, case: ParityCase) -> tuple[float, float]:
    """One cell on this rank: the largest errors of gradients (with norms) and of final parameters."""
    return measure_parity(rank, world, place(device, rank), case)


def place(device: str, rank: int) -> torch.device:
    """The device of a rank of the pool."""
    return torch.device(device, rank) if device == "cuda" else torch.device(device)


def measure_parity(
    rank: int, world: int, device: torch.device, case: ParityCase, mutate: Callable[[Engine], Engine] = lambda e: e
) -> tuple[float, float]:
    """As `parity_job`, judged by rank 0 (the others return zeros); `mutate` may spoil the engine, to turn cells red."""
    config = MODELS[case.model]
    parallel = case.parallel
    gpt, model = parity_model(config, world, device, parallel)
    start = gather_whole(dict(gpt.named_parameters()))
    optimizer = build_optimizer(gpt, OPTIM, GPT_PLAN)
    engine = RecordingEngine(gpt, model, optimizer, parallel=parallel, device=device)
    spoilt = mutate(engine)
    for step in range(STEPS):
        train_step(spoilt, rank_batches(step, rank, world, case.accumulation), lr_factor=1.0, device=device)
    end = gather_whole(dict(gpt.named_parameters()))
    if rank != 0:
        return 0.0, 0.0

    batches = [global_batch(step) for step in range(STEPS)]
    expected, expected_end = reference_training(config, optimizer.groups, start, batches)
    errors = [0.0]
    for seen, grad_norm, reference in zip(engine.gradients, engine.grad_norms, expected, strict=True):
        errors += [tensor_error(name, seen[name], gradient) for name, gradient in reference.gradients.items()]
        errors.append(abs(grad_norm / reference.grad_norm.item() - 1))
    return max(errors), max(tensor_error(name, end[name], weight) for name, weight in expected_end.items())


def parity_model(
    config: ModelConfig,
    world: int,
    device: torch.device,
    parallel: ParallelConfig,
    probe: NoiseProbe | None = None,
) -> tuple[GPT, nn.Module]:
    """A small GPT in fp64 on the layout, with the weights that every layout begins with; and the module to call."""
    dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
    mesh, kind = build_mesh(dims, device.type), torch.float64
    return build_model(
        config, max_length=LENGTH, mesh=mesh, parallel=parallel, seed=0, device=device, dtype=kind, probe=probe
    )


class RecordingEngine(NativeEngine):
    """Keeps the gradients of every step as they were before clipping."""

    def __init__(self, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self.gradients: list[dict[str, Tensor]] = []
        self.grad_norms: list[float] = []

    def finish_step(self, lr_factor: float | Sequence[float], loss: Tensor | None = None) -> UpdateResult:
        grads = {name: p.grad for name, p in self.module.named_parameters()}
        self.gradients.append(gather_whole({name: grad for name, grad in grads.items() if grad is not None}))
        update = super().finish_step(lr_factor, loss)
        self.grad_norms.append(update.grad_norm.item())
        return update


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [ROWS, LENGTH] of a step: ever fewer valid labels from row to row, none in the last quarter."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(53, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(53, (ROWS, LENGTH), generator=generator)
    dropped = torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(0.05, 0.9, ROWS)[:, None]
    dropped[-ROWS // 4 :] = True
    return tokens, labels.masked_fill(dropped, -100)


def tensor_error(name: str, actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|; absolute for key biases, whose gradient is zero."""
    error = (actual - expected).abs().max().item()
    return error if fnmatchcase(name, _ZERO_GRADIENT) else error / max(expected.abs().max().item(), 1e-300)


def rank_batches(step: int, rank: int, world: int, accumulation: int) -> list[tuple[Tensor, Tensor]]:
    tokens, labels = (part.chunk(world)[rank].chunk(accumulation) for part in global_batch(step))
    return list(zip(tokens, labels, strict=True))


def gather_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of every tensor, on the CPU of every rank, in one exchange; sharded ones are cut along dim 0."""
    local = {n: (t.to_local() if isinstance(t, DTensor) else t).detach().cpu().clone() for n, t in tensors.items()}
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return local
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, local)
    return {
        name: torch.cat([held[rank][name] for rank in _shard_ranks(tensor)])
        if isinstance(tensor, DTensor)
        else local[name]
        for name, tensor in tensors.items()
    }


def _shard_ranks(tensor: DTensor) -> list[int]:
    """The ranks that hold one copy between them, in the order of their rows; replicas hold the same again."""
    mesh = tensor.device_mesh
    return mesh.mesh.reshape(-1, mesh.size(mesh.ndim - 1))[0].tolist()
