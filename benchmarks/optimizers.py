"""What optimizers cost on shards: `python benchmarks/optimizers.py [--nproc 4]`, minutes on two cores.

A GPT of 5.9 million parameters under fsdp on gloo, with drawn gradients; only the update is measured, without clipping,
which costs all of them one all-reduce. Worlds 1, 2 and 4, up to --nproc. Writes results/optimizers.json and .md:

- step time: the ratio to fused AdamW within one round, in which each case takes one step; median of the rounds, with
  lowest and highest. Processes share cores. `add` only adds the gradients to the weights: no update can be faster;
- core time: the same of what all ranks' threads worked, which a busy machine disturbs less;
- sent: collectives of one update and the bytes of their whole tensors (`CollectiveCounter`);
- state: bytes of optimizer state for each parameter of the whole model, counted once over the ranks of one copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.algorithms import ALGORITHMS
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.models import GPT_PLAN
from disttrain.optim import OptimizerSet, build_optimizer
from disttrain.optim.sharding import local
from disttrain.testing import RankPool
from disttrain.testing.collectives import CollectiveCounter
from disttrain.train.build import build_model

RESULTS = Path(__file__).resolve().parent / "results"
MODEL = ModelConfig(n_layers=6, d_model=256, n_heads=4, vocab_size=4096)
LENGTH = 256
CPU = torch.device("cpu")
WORLDS = (1, 2, 4)
BASELINE = "adamw"
FLOOR = "add"

CASES: dict[str, dict[str, Any]] = {
    BASELINE: {"preset": "adamw"},
    **{name: {"preset": name} for name in ALGORITHMS if name != BASELINE},
    "adamw, bf16 states": {"preset": "adamw", "state_dtype": "bf16"},
    "adamw, int8 states": {"preset": "adamw", "state_dtype": "int8"},
    "torch.optim.NAdam, adapted": {
        "groups": [{"name": "all", "match": [".*"], "algorithm": "torch.optim.NAdam", "lr": 1e-3}]
    },
}


class Case:
    """One optimizer over a model of its own, with gradients that stay what they are."""

    def __init__(self, world: int, settings: dict[str, Any]) -> None:
        parallel = ParallelConfig(strategy="fsdp")
        mesh = build_mesh(ParallelDims.resolve("fsdp", None, None, world), "cpu")
        self.gpt, _ = build_model(MODEL, max_length=LENGTH, mesh=mesh, parallel=parallel, seed=0, device=CPU)
        self.optimizer: OptimizerSet = build_optimizer(self.gpt, OptimConfig.model_validate(settings), GPT_PLAN)
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.parameters = list(self.gpt.parameters())
        self.drawn = [torch.randn(local(p).shape, generator=generator) * 1e-2 for p in self.parameters]

    def with_gradients(self) -> None:
        """Drawn anew each time: Adafactor works in the gradient's memory."""
        for parameter, drawn in zip(self.parameters, self.drawn, strict=True):
            gradient = drawn.clone()
            if isinstance(parameter, DTensor):
                gradient = DTensor.from_local(
                    gradient,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            parameter.grad = gradient

    @torch.no_grad()
    def add(self) -> None:
        weights, gradients = ([local(t) for t in kind] for kind in (self.parameters, self._gradients()))
        torch._foreach_add_(weights, gradients, alpha=-1e-9)

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def state_bytes_per_parameter(self) -> float:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        elements = sum(parameter.numel() for parameter in self.parameters)
        return sum(value.numel() * value.element_size() for value in states) / elements


# What ranks do.


def measure(rank: int, world: int, rounds: int) -> dict[str, Any]:
    cases = {name: Case(world, settings) for name, settings in CASES.items()}
    updates: dict[str, Callable[[], None]] = {name: case.optimizer.step for name, case in cases.items()}
    updates[FLOOR], cases[FLOOR] = cases[BASELINE].add, cases[BASELINE]
    sent = {}
    for name, update in updates.items():
        cases[name].with_gradients()
        with CollectiveCounter() as counter:
            update()
        sent[name] = {"calls": sum(counter.calls.values()), "bytes": sum(counter.bytes.values())}
    names, measured = list(updates), []
    for index in range(rounds):
        turn = index * len(names) // rounds
        seconds = {}
        for name in names[turn:] + names[:turn]:
            cases[name].with_gradients()
            dist.barrier()
            began, worked = time.perf_counter(), time.process_time()
            updates[name]()
            dist.barrier()
            seconds[name] = (time.perf_counter() - began, time.process_time() - worked)
        measured.append(seconds)
    state = {name: case.state_bytes_per_parameter() for name, case in cases.items()}
    return {"sent": sent, "seconds": measured, "state": state | {FLOOR: 0.0}}


# What becomes of it.


def table(ranks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Wall time is that of rank 0, which waits for all; core time is the sum over ranks."""
    rows = {}
    for name in ranks[0]["sent"]:
        wall = [row[name][0] / row[BASELINE][0] for row in ranks[0]["seconds"]]
        rounds = zip(*(rank["seconds"] for rank in ranks), strict=True)
        cores = [sum(r[name][1] for r in row) / sum(r[BASELINE][1] for r in row) for row in rounds]
        rows[name] = {
            "step_time": [statistics.median(wall), min(wall), max(wall)],
            "core_time": [statistics.median(cores), min(cores), max(cores)],
            **{f"sent_{key}": value for key, value in ranks[0]["sent"][name].items()},
            "state_bytes_per_parameter": ranks[0]["state"][name],
        }
    return rows


def markdown(results: dict[str, Any]) -> str:
    lines = ["# Optimizers on shards", "", f"`{results['command']}`: {results['what']}", ""]
    for world, rows in results["worlds"].items():
        lines += [f"## World {world}", ""]
        lines += ["| optimizer | step time | core time | collectives | bytes sent | state bytes per parameter |"]
        lines += ["|---|---|---|---|---|---|"]
        for name, row in rows.items():
            times = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in (row["step_time"], row["core_time"])]
            numbers = f"{row['sent_calls']} | {row['sent_bytes']:,} | {row['state_bytes_per_parameter']:.2f}"
            lines.append(f"| {name} | {times[0]} | {times[1]} | {numbers} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    worlds = [world for world in WORLDS if world <= arguments.nproc]
    with RankPool(max_world=max(worlds)) as pool:
        measured = {
            str(world): table(pool.run("benchmarks.optimizers:measure", world, 900, rounds=arguments.rounds))
            for world in worlds
        }
    results = {
        "command": f"python benchmarks/optimizers.py --nproc {arguments.nproc} --rounds {arguments.rounds}",
        "what": "time of one update as a ratio to fused AdamW in the same round: median (lowest to highest)",
        "torch": torch.__version__,
        "worlds": measured,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "optimizers.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "optimizers.md").write_text(markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
