"""What ranks do in test_safeguards.py and test_clip_parity.py."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import disttrain.optim.qk_clip as qk_clip
from disttrain.config import ModelConfig, OptimConfig
from disttrain.config.clipping import AGC, AdaptiveClip, Clip, ClipNorm, ClipValue, ZClip
from disttrain.config.groups import AdamW
from disttrain.config.parallel import ParallelConfig
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN
from disttrain.optim import GradientClipper, UpdateLimit, build_optimizer, build_safeguards
from disttrain.testing.clip_parity import clip_job
from disttrain.testing.optimizer_parity import STRATEGIES, Toys, drawn_gradients
from disttrain.testing.parity import gather_whole, parity_model
from disttrain.train.step import train_step
from tests.optim.jobs import mixed_parameters, whole_of

CPU = torch.device("cpu")
KINDS: list[Clip] = [
    AdaptiveClip(warmup_steps=2, early=0.2, late=0.1, max_norm=0.5),
    AGC(limit=0.05, skip=()),
    ZClip(warmup_steps=2, z=0.1),
    ClipValue(limit=0.1),
    ClipNorm(limit=0.3, p=3, over="all"),
]


def every_kind(rank: int, world: int) -> list[Tensor]:
    """Gradients after five steps of groups that are each clipped their own way, by one all-reduce a step; and shares
    [steps, groups]."""
    parameters = mixed_parameters(world)
    members = [[parameters[0], parameters[-1]], *([p] for p in parameters[1:-1])]
    groups = [
        {"name": f"g{i}", "params": owned, "config": AdamW(name=f"g{i}", match=(".*",), clip=clip)}
        for i, (owned, clip) in enumerate(zip(members, KINDS, strict=True))
    ]
    clipper, shares = GradientClipper(groups, ["a", "b", "c", "d", "e", "f"], steps=100), []
    for step in range(5):
        for parameter, fresh in zip(parameters, mixed_parameters(world), strict=True):
            parameter.grad = fresh.grad
        with torch.no_grad(), CommDebugMode() as calls:
            shares.append(clipper.dist_clip(torch.tensor(1.0 + step)).shares)
        assert sum(calls.get_comm_counts().values()) == 1
    return [*whole_of(parameters), torch.stack(shares)]


def limited(rank: int, world: int, strategy: str) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Ratios, and the weights before, after the step alone, and as limited; the last rank holds odd rows."""
    toys = Toys(world, CPU, ParallelConfig(**STRATEGIES[strategy]))
    limit, start = UpdateLimit(list(toys.parameters()), 0.05), gather_whole(dict(toys.named_parameters()))
    nn.init.zeros_(toys.zero)
    limit.remember()
    toys.set_gradients({n: 0.1 * g for n, g in drawn_gradients(0).items()} | {"zero": torch.ones(5, 2).double()})
    torch.optim.SGD([{"params": [p], "lr": 1e-4 if n == "square" else 1.0} for n, p in toys.named_parameters()]).step()
    moved = gather_whole(dict(toys.named_parameters()))
    ratios = limit.dist_apply()
    return ratios.tolist(), [start, moved, gather_whole(dict(toys.named_parameters()))]


def limited_infinity(rank: int, world: int) -> list[float]:
    """A parameter whose step was infinite in one place."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    limit = UpdateLimit([parameter], 0.1)
    limit.remember()
    parameter.data += torch.tensor([math.inf, 1.0])
    limit.dist_apply()
    return parameter.tolist()


def attention_engine(world: int, settings: dict[str, Any], model: ModelConfig, qk: dict[str, Any]) -> NativeEngine:
    """A GPT whose heads differ much in how large their logits are, under an optimizer that moves nothing."""
    parallel = ParallelConfig(**settings)
    gpt, called = parity_model(model, world, CPU, parallel)
    for block in gpt.blocks:
        for projection in (block.attention.wq, block.attention.wk):
            heads = torch.arange(1, projection.out_features // model.head_dim + 1, dtype=torch.float64)
            rows = heads.repeat_interleave(model.head_dim)
            with torch.no_grad():
                for parameter in projection.parameters():
                    whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).double()
                    whole = whole * (rows if whole.ndim == 1 else rows[:, None])
                    _fill(parameter, whole)
    optim = OptimConfig.model_validate({"qk_clip": {"mode": "clip", "logits": "exact", **qk}})
    optimizer = build_optimizer(gpt, optim, GPT_PLAN)
    safeguards = build_safeguards(gpt, optimizer, optim, GPT_PLAN, device=CPU, steps=10)
    return NativeEngine(gpt, called, optimizer, parallel=parallel, device=CPU, safeguards=safeguards)


def qk_limits(
    rank: int, world: int, settings: dict[str, Any], model: ModelConfig, qk: dict[str, Any]
) -> dict[str, Any]:
    """The largest logits of the batch before and after a step that only QK-Clip acts in, and each rank's own before."""
    engine = attention_engine(world, settings, model, qk)
    batches = [(tokens, tokens.roll(-1, 1)) for tokens in rank_tokens(rank, model.vocab_size or 0)]
    assert engine.safeguards.qk_clip is not None
    [watch] = engine.safeguards.qk_clip.watches
    own, reset = [], watch.reset
    watch.reset = lambda: (own.append(watch.maxima.clone()), reset())  # type: ignore[method-assign]
    before = train_step(engine, batches, lr_factor=0.0, device=CPU).update.logits
    after = train_step(engine, batches, lr_factor=0.0, device=CPU).update.logits
    assert before is not None
    assert after is not None
    weights = gather_whole(dict(engine.module.named_parameters()))
    return {
        "own": own[0],
        "before": before.largest[0],
        "scales": before.scales[0],
        "after": after.largest[0],
        "weights": {name: weight for name, weight in weights.items() if ".wq." in name or ".wk." in name},
    }


def rank_tokens(rank: int, vocab_size: int) -> list[Tensor]:
    """Two microbatches; every rank's are others."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(vocab_size, (2, 7), generator=generator) for _ in range(2)]


def watched(rank: int, world: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Maxima, gradients and losses with the watch on, under memory techniques; and that evaluation is not watched."""
    model = ModelConfig(n_layers=2, d_model=12, n_heads=3, n_kv_heads=1, d_ff=20, vocab_size=53, position="rope")
    engine = attention_engine(world, settings, model, {"mode": "log", "logits": "bound"})
    tokens = rank_tokens(rank, 53)[0]
    loss = engine.forward(tokens, tokens.roll(-1, 1), last=True)
    engine.backward(loss)
    assert engine.safeguards.qk_clip is not None
    watches = engine.safeguards.qk_clip.watches
    maxima = torch.stack([watch.maxima for watch in watches])
    gradients = gather_whole({n: p.grad for n, p in engine.module.named_parameters() if p.grad is not None})
    with torch.no_grad():
        engine.model((tokens + 1) % 53, tokens)
    assert torch.equal(maxima, torch.stack([watch.maxima for watch in watches]))
    return {"maxima": maxima, "gradients": gradients, "loss": loss.detach()}


def muon_lengths(rank: int, world: int, clip: dict[str, Any]) -> list[float]:
    """How long the steps of two matrices are, over those of orthogonal ones, with a spike by a thousand on the way."""
    toys = Toys(world, CPU, ParallelConfig())
    matrices = {"name": "matrices", "match": ["square|wide"], "algorithm": "muon", "lr": 0.01, "weight_decay": 0.0}
    config = OptimConfig.model_validate({"groups": [matrices, {"name": "rest", "match": [".*"]}], **clip})
    optimizer = build_optimizer(toys, config, GPT_PLAN)
    guards = build_safeguards(toys, optimizer, config, GPT_PLAN, device=CPU, steps=10)
    assert guards.update_limit is None
    lengths = []
    for step in range(6):
        before = gather_whole(dict(toys.named_parameters()))
        toys.set_gradients({n: g * (1e3 if step == 3 else 1.0) for n, g in drawn_gradients(step).items()})
        guards.clipper.dist_clip(torch.ones(()))
        optimizer.step()
        after = gather_whole(dict(toys.named_parameters()))
        for name in ("square", "wide"):
            orthogonal = 0.01 * 0.2 * math.sqrt(max(after[name].shape)) * math.sqrt(min(after[name].shape))
            lengths.append((after[name] - before[name]).norm().item() / orthogonal)
    return lengths


def mistaken(rank: int, world: int, mistake: str, settings: dict[str, Any]) -> dict[str, float]:
    """The errors of all policies with `mistake`."""
    if mistake == "maxima stay local":
        own = SimpleNamespace(all_reduce=lambda *arguments, **named: None, ReduceOp=dist.ReduceOp)
        qk_clip.dist = own  # type: ignore[assignment]
        try:
            return clip_job(rank, world, "cpu", settings)
        finally:
            qk_clip.dist = dist
    return clip_job(rank, world, "cpu", settings, spoil=_MISTAKES[mistake])


def _forget_biases(engine: NativeEngine) -> None:
    if engine.safeguards.qk_clip:
        points = engine.safeguards.qk_clip.points
        engine.safeguards.qk_clip.points = {p: tensors if p.ndim > 1 else [] for p, tensors in points.items()}


def _forget_history(engine: NativeEngine) -> None:
    clip = engine.safeguards.clipper.dist_clip

    def forgetful(*arguments: Any) -> Any:
        for state in engine.safeguards.clipper.state().values():
            state[0] += 1e-9
        return clip(*arguments)

    engine.safeguards.clipper.dist_clip = forgetful  # type: ignore[method-assign]


_MISTAKES = {"biases are forgotten": _forget_biases, "a mean that drifts": _forget_history}


def _fill(parameter: nn.Parameter, whole: Tensor) -> None:
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    parameter.copy_(whole)
