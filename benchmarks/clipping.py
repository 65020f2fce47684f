"""What clipping costs of a training step: `python benchmarks/clipping.py`, minutes on two cores.

A GPT of 5.9 million parameters with AdamW under fsdp on gloo, worlds 1 and 2, sequences of 256 tokens. Each policy has
a model and engine of its own. In every round each policy takes a step right after one without any clipping (which turns
with the rounds into one right before it); its cost is the ratio of the two, less one: the median of the rounds and
their quartiles. Writes results/clipping.{json,md}:

- of wall time, and of what all ranks' threads worked, which a busy machine disturbs less;
- collectives of the update, counted (`CollectiveCounter`): clipping has one all-reduce, and some things one more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer, build_safeguards
from disttrain.testing import RankPool
from disttrain.testing.collectives import CollectiveCounter
from disttrain.train.build import build_model
from disttrain.train.step import train_step

RESULTS = Path(__file__).resolve().parent / "results"
MODEL = ModelConfig(n_layers=6, d_model=256, n_heads=4, vocab_size=4096)
LENGTH, ROWS = 256, 2
CPU = torch.device("cpu")
WORLDS = (1, 2)
BASELINE = "no clipping"
NOTHING = {"clip": {"kind": "none"}}
POLICIES: dict[str, dict[str, Any]] = {
    BASELINE: NOTHING,
    "no clipping again": NOTHING,
    "norm of all": {"clip_norm": 1.0},
    "norm of groups": {"clip": {"kind": "norm", "limit": 1.0}},
    "value": {"clip": {"kind": "value", "limit": 0.1}},
    "zclip": {"clip": {"kind": "zclip"}},
    "agc": {"clip": {"kind": "agc"}},
    "adaptive": {"clip": {"kind": "adaptive", "warmup_steps": 2}},
    "limit on updates": {**NOTHING, "max_update_ratio": 0.1},
    "qk-clip, bound": {**NOTHING, "qk_clip": {"mode": "clip"}},
    "qk-clip, exact": {**NOTHING, "qk_clip": {"mode": "clip", "logits": "exact"}},
    "adaptive, limit, qk-clip": {
        "clip": {"kind": "adaptive", "warmup_steps": 2},
        "max_update_ratio": 0.1,
        "qk_clip": {"mode": "clip"},
    },
}


# What ranks do.


def build_engine(world: int, settings: dict[str, Any]) -> NativeEngine:
    parallel, optim = ParallelConfig(strategy="fsdp"), OptimConfig.model_validate(settings)
    mesh = build_mesh(ParallelDims.resolve("fsdp", None, None, world), "cpu")
    gpt, model = build_model(MODEL, max_length=LENGTH, mesh=mesh, parallel=parallel, seed=0, device=CPU)
    optimizer = build_optimizer(gpt, optim, GPT_PLAN)
    guards = build_safeguards(gpt, optimizer, optim, GPT_PLAN, device=CPU, steps=1000)
    return NativeEngine(gpt, model, optimizer, parallel=parallel, device=CPU, safeguards=guards)


def measure(rank: int, world: int, rounds: int) -> dict[str, Any]:
    engines = {name: build_engine(world, settings) for name, settings in POLICIES.items()}
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(4096, (ROWS, LENGTH), generator=generator)
    batch = [(tokens, tokens.roll(-1, 1))]

    def timed(name: str) -> tuple[float, float]:
        dist.barrier()
        began, worked = time.perf_counter(), time.process_time()
        train_step(engines[name], batch, lr_factor=0.1, device=CPU)
        dist.barrier()
        return time.perf_counter() - began, time.process_time() - worked

    counted = {}
    for name, engine in engines.items():
        for _ in range(3):  # past the warm-up, with all buffers there
            train_step(engine, batch, lr_factor=0.1, device=CPU)
        loss = engine.forward(*batch[0], last=True)
        engine.backward(loss)
        with CollectiveCounter() as counter:
            engine.finish_step(0.1)
        counted[name] = sum(counter.calls.values())
    seconds: dict[str, list[Any]] = {name: [] for name in POLICIES if name != BASELINE}
    for index in range(rounds):
        for name, pairs in seconds.items():
            order = (BASELINE, name) if index % 2 else (name, BASELINE)
            pair = {one: timed(one) for one in order}
            pairs.append([*pair[name], *pair[BASELINE]])
    return {"seconds": seconds, "collectives": counted}


# What becomes of it.


def summarise(ranks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Wall time is that of rank 0, which waits for all; core time is the sum over ranks."""
    rows = {}
    for name, pairs in ranks[0]["seconds"].items():
        wall = [own / base - 1 for own, _, base, _ in pairs]
        together = zip(*(rank["seconds"][name] for rank in ranks), strict=True)
        core = [sum(p[1] for p in pair) / sum(p[3] for p in pair) - 1 for pair in together]
        rows[name] = {
            "wall": statistics.quantiles(wall, n=4),
            "core": statistics.quantiles(core, n=4),
            "collectives": ranks[0]["collectives"][name] - ranks[0]["collectives"][BASELINE],
        }
    return rows


def markdown(results: dict[str, Any]) -> str:
    lines = ["# What clipping costs of a step", "", f"`{results['command']}`: {results['what']}", ""]
    for world, rows in results["worlds"].items():
        lines += [f"## World {world}", "", "| | wall time | core time | collectives more |", "|---" * 4 + "|"]
        for name, row in rows.items():
            shares = [f"{m:+.1%} ({low:+.1%} to {high:+.1%})" for low, m, high in (row["wall"], row["core"])]
            lines.append(f"| {name} | {' | '.join(shares)} | {row['collectives']} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    with RankPool(max_world=max(WORLDS)) as pool:
        worlds = {
            str(world): summarise(pool.run("benchmarks.clipping:measure", world, 1800, rounds=arguments.rounds))
            for world in WORLDS
        }
    results = {
        "command": f"python benchmarks/clipping.py --rounds {arguments.rounds}",
        "what": "cost over a step without clipping, right beside it: median (quartiles); both find the norms that "
        "tell whether a gradient is finite",
        "torch": torch.__version__,
        "worlds": worlds,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "clipping.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "clipping.md").write_text(markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
