"""What ranks do in test_memory.py and test_precision.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import disttrain.parallel.compile as compile_module
from disttrain.config import ModelConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import UpdateResult
from disttrain.models import GPT, GPT_PLAN
from disttrain.models.attention_logits import LogitWatch
from disttrain.optim import build_optimizer
from disttrain.parallel.precision import DTYPES, CastParameters
from disttrain.testing.parity import (
    LENGTH,
    MODELS,
    OPTIM,
    RecordingEngine,
    global_batch,
    parity_model,
    tensor_error,
)
from disttrain.train.build import build_model
from disttrain.train.step import train_step

CPU = torch.device("cpu")


def build_engine(world: int, parallel: ParallelConfig, model: str, dtype: torch.dtype) -> RecordingEngine:
    dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
    gpt, called = build_model(
        MODELS[model],
        max_length=LENGTH,
        mesh=build_mesh(dims, "cpu"),
        parallel=parallel,
        seed=0,
        device=CPU,
        dtype=dtype,
    )
    optimizer = build_optimizer(gpt, OPTIM, GPT_PLAN)
    return RecordingEngine(gpt, called, optimizer, parallel=parallel, device=CPU)


def rank_batches(step: int, rank: int, world: int, accumulation: int) -> list[tuple[Tensor, Tensor]]:
    tokens, labels = (part.chunk(world)[rank].chunk(accumulation) for part in global_batch(step))
    return list(zip(tokens, labels, strict=True))


def train(rank: int, world: int, settings: dict[str, Any], model: str = "modern", steps: int = 2) -> dict[str, Any]:
    """Losses of this rank, gradients of every step and the parameters after them, whole, in fp32."""
    engine = build_engine(world, ParallelConfig(**settings), model, torch.float32)
    losses = []
    for step in range(steps):
        result = train_step(engine, rank_batches(step, rank, world, 2), lr_factor=1.0, device=CPU)
        losses.append(result.loss_sum.item())
    whole = {name: _whole(parameter) for name, parameter in engine.module.named_parameters()}
    return {"losses": losses, "gradients": engine.gradients, "parameters": whole}


def operations(rank: int, world: int, mode: str) -> dict[str, int]:
    """How often attention and matrix products run in one forward and backward under fsdp."""
    engine = build_engine(world, ParallelConfig(activation_checkpointing=mode), "modern", torch.float32)  # type: ignore[arg-type]
    with _OperationCounter() as counter:
        train_step(engine, rank_batches(0, rank, world, 1), lr_factor=1.0, device=CPU)
    return {name: counter.calls[name] for name in ("_scaled_dot_product_flash_attention_for_cpu", "mm", "silu")}


class _OperationCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def largest_logits(rank: int, world: int, chunk: int) -> int:
    """The most rows of logits that any operation of a step returned."""
    engine = build_engine(world, ParallelConfig(loss_chunk_tokens=chunk), "modern", torch.float32)
    with _LogitRows() as seen:
        train_step(engine, rank_batches(0, rank, world, 1), lr_factor=1.0, device=CPU)
    return seen.rows


class _LogitRows(TorchDispatchMode):
    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim > 1 and result.shape[-1] == 53:
            self.rows = max(self.rows, result.numel() // 53)
        return result


def mixed_precision_errors(rank: int, world: int, settings: dict[str, Any]) -> float:
    """Largest gradient error against one process that casts, computes each share, and adds in fp32, as the ranks do."""
    parallel = ParallelConfig(**settings)
    engine = build_engine(world, parallel, "gpt2", torch.float32)
    alone = GPT(MODELS["gpt2"], LENGTH)
    alone.load_state_dict({n: _whole(p) for n, p in engine.module.named_parameters()}, strict=False)
    train_step(engine, rank_batches(0, rank, world, 3), lr_factor=1.0, device=CPU)
    dtype = DTYPES[parallel.param_dtype]
    assert dtype is not None
    cast, count = CastParameters(alone, dtype), int((global_batch(0)[1] >= 0).sum())
    scale = 2.0**16 if parallel.param_dtype == "fp16" else 1.0
    for other in range(world):
        for tokens, labels in rank_batches(0, other, world, 3):
            (cast(tokens, labels) / count * scale).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in alone.parameters())
    seen = engine.gradients[0]
    return max(tensor_error(n, seen[n], p.grad) for n, p in alone.named_parameters() if "wk.bias" not in n)  # type: ignore[arg-type]


class _Overflowing(RecordingEngine):
    """Puts an infinity into one gradient of rank 1, after the reduction, in the second step."""

    def finish_step(self, lr_factor: float | Sequence[float], loss: Tensor | None = None) -> UpdateResult:
        if dist.get_rank() == 1 and len(self.grad_norms) == 1:
            gradient = self.module.blocks[0].mlp.up.weight.grad  # type: ignore[union-attr, index]
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.view(-1)[0] = math.inf  # type: ignore[union-attr]
        return super().finish_step(lr_factor, loss)


def overflow_on_one_rank(rank: int, world: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """After each of three steps, the second of which overflows on rank 1: all state, whole."""
    engine = build_engine(world, ParallelConfig(param_dtype="fp16", **settings), "gpt2", torch.float32)
    engine.__class__ = _Overflowing
    seen = []
    for step in range(3):
        result = train_step(engine, rank_batches(step, rank, world, 1), lr_factor=1.0, device=CPU)
        state = {name: _whole(tensor) for name, tensor in engine.state().items()}
        seen.append({"skipped": result.update.skipped.item(), "state": state})
    return seen


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def two_compiled_models(rank: int, world: int) -> int:
    """How many models of different numbers of heads went through the same compiled code, without a C++ compiler."""
    compiling, trained = torch.compile, 0
    torch._dynamo.reset()  # what other jobs of this process compiled counts against a limit
    compile_module.torch.compile = partial(compiling, backend="eager")
    try:
        for heads, shared in ((3, 1), (6, 2)):
            config = ModelConfig(n_layers=1, d_model=4 * heads, n_heads=heads, n_kv_heads=shared, vocab_size=53)
            parallel = ParallelConfig(strategy="fsdp", compile=True)
            gpt, called = parity_model(config, world, CPU, parallel)
            tokens, labels = global_batch(0)
            for method in (None, "exact", "bound"):
                for block in gpt.blocks:
                    block.attention.logit_watch = LogitWatch(heads, method, CPU) if method else None
                called(tokens, labels).backward()
            trained += 1
    finally:
        compile_module.torch.compile = compiling
        torch._dynamo.reset()
    return trained
