"""The gradient noise scale in a sharded step: `python benchmarks/noise_scale.py`, a minute on two cores.

- Right on average: a small GPT in fp64 under fsdp on two processes, weights fixed, 600 steps of sequences drawn from
  64, unequally many on the ranks; the mean of both estimates with its 99.9 % interval, beside the exact values from
  the gradients of all 64 sequences.
- What it costs: a GPT of 5.9 million parameters, each step that measures right beside one that does not; a run measures
  in every tenth step (`monitor.noise_scale_every`).

Writes results/noise_scale.{json,md}.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN, init_parameters
from disttrain.optim import build_optimizer
from disttrain.optim.noise_scale import noise_estimates
from disttrain.parallel import NoiseProbe
from disttrain.testing import RankPool
from disttrain.testing.parity import MODELS
from disttrain.train.build import build_gpt, build_model
from disttrain.train.step import train_step

RESULTS = Path(__file__).resolve().parent / "results"
CPU, WORLD = torch.device("cpu"), 2
SMALL, LENGTH, SEQUENCES, DRAWS, SHARES = MODELS["gpt2"], 7, 64, 600, (2, 5)
LARGE = ModelConfig(n_layers=6, d_model=256, n_heads=4, vocab_size=4096)


# What ranks do.


def build_engine(world: int, model: ModelConfig, length: int, dtype: torch.dtype) -> NativeEngine:
    parallel = ParallelConfig(strategy="fsdp")
    dims = ParallelDims.resolve("fsdp", None, None, world)
    mesh, probe = build_mesh(dims, "cpu"), NoiseProbe(parallel, dims)
    gpt, called = build_model(
        model, max_length=length, mesh=mesh, parallel=parallel, seed=0, device=CPU, dtype=dtype, probe=probe
    )
    optimizer = build_optimizer(gpt, OptimConfig(), GPT_PLAN)
    return NativeEngine(gpt, called, optimizer, parallel=parallel, device=CPU, probe=probe)


def sequences() -> Tensor:
    return torch.randint(9, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def draws(rank: int, world: int) -> list[tuple[float, float]]:
    """Estimates of |G|^2 and tr(S) of every draw."""
    engine, generator, found = build_engine(world, SMALL, LENGTH, torch.float64), torch.Generator().manual_seed(1), []
    rows = sequences()
    for _ in range(DRAWS):
        picked = torch.randint(SEQUENCES, (sum(SHARES),), generator=generator).split(SHARES)[rank]
        batch = (rows[picked, :-1], rows[picked, 1:])
        result = train_step(engine, [batch], lr_factor=0.0, device=CPU, measure_noise=True)
        norms = result.update.norms
        chunks = result.update.chunks
        assert chunks is not None
        signal, noise = noise_estimates(norms.total.square(), chunks, result.valid_tokens, result.chunk_squares)
        found.append((signal.item(), noise.item()))
    return found


def costs(rank: int, world: int, rounds: int) -> list[float]:
    """Time of a step that measures over that of the one beside it."""
    engine = build_engine(world, LARGE, 256, torch.float32)
    tokens = torch.randint(4096, (2, 256), generator=torch.Generator().manual_seed(rank))
    ratios = []
    for index in range(-3, rounds):
        seconds = {}
        for measuring in (True, False) if index % 2 else (False, True):
            dist.barrier()
            began = time.perf_counter()
            train_step(engine, [(tokens, tokens.roll(-1, 1))], lr_factor=0.1, device=CPU, measure_noise=measuring)
            dist.barrier()
            seconds[measuring] = time.perf_counter() - began
        ratios.append(seconds[True] / seconds[False])
    return ratios[3:]


# What becomes of it.


def exact() -> tuple[float, float]:
    """|G|^2, and tr(S) of one token where sequences are independent: of their mean gradients, times their length."""
    gpt = build_gpt(SMALL, LENGTH, CPU, torch.float64)
    init_parameters(gpt, seed=0)
    gradients = []
    for row in sequences():
        gpt.zero_grad()
        (gpt(row[None, :-1], row[None, 1:]) / LENGTH).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters() if p.grad is not None]))
    stacked = torch.stack(gradients)
    mean = stacked.mean(0)
    return mean.square().sum().item(), LENGTH * (stacked - mean).square().sum(1).mean().item()


def interval(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), 3.29 * statistics.stdev(values) / math.sqrt(len(values))


def markdown(results: dict[str, Any]) -> str:
    lines = ["# The gradient noise scale", "", f"`{results['command']}`: {results['what']}", ""]
    lines += ["| | mean of the estimates | exactly |", "|---|---|---|"]
    for name, row in results["estimates"].items():
        lines.append(f"| {name} | {row['mean']:.4g} +- {row['half_width']:.2g} | {row['exact']:.4g} |")
    low, middle, high = results["cost"]
    lines += [
        "",
        f"A step that measures takes {middle:.3f} times one that does not (quartiles {low:.3f} to {high:.3f}), ",
    ]
    lines[-1] += f"so measuring every tenth costs {(middle - 1) / 10:.2%} of a run."
    return "\n".join([*lines, ""])


def main() -> int:
    with RankPool(max_world=WORLD) as pool:
        found = pool.run("benchmarks.noise_scale:draws", WORLD, 300)[0]
        ratios = pool.run("benchmarks.noise_scale:costs", WORLD, 600, rounds=60)[0]
    rows = {}
    names = ("square of the true gradient", "tr(S) of a token")
    for name, values, truth in zip(names, zip(*found, strict=True), exact(), strict=True):
        mean, half_width = interval(list(values))
        rows[name] = {"mean": mean, "half_width": half_width, "exact": truth}
    results = {
        "command": "python benchmarks/noise_scale.py",
        "what": f"{DRAWS} draws of {' and '.join(map(str, SHARES))} sequences on two processes, 99.9 % intervals",
        "estimates": rows,
        "cost": statistics.quantiles(ratios, n=4),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "noise_scale.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "noise_scale.md").write_text(markdown(results))
    print(markdown(results))
    return int(any(abs(row["mean"] - row["exact"]) > row["half_width"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
