"""What optimizers cost on shards: `python benchmarks/optimizers.py [--nproc 4]`, minutes on two cores.

A GPT of 5.9 million parameters under fsdp on gloo, with drawn gradients; only the update is measured, without clipping,
which costs all of them one all-reduce. Worlds 1, 2 and 4, up to --nproc. Writes results/optimizers.json and .md:

- step time: the ratio to fused AdamW within one round, in which each case takes one step; median of the rounds, with
  lowest and highest. Processes share cores. `add` only adds the gradients to the weights: no update can be faster;
- core time: the same of what all ranks' threads worked, which a busy machine disturbs less;
- collectives of one update, and the bytes of their largest tensors, summed over ranks (`CollectiveCounter`);
- GFLOP: products of matrices in one update, counted by torch (`FlopCounterMode`);
- state: bytes of optimizer state that all ranks hold together, for each parameter of the model.

Whole matrices: Muon and others beside torch.optim.Muon, which works on DTensors, and heavyball (if it is installed:
`pip install 'disttrain[peers]'`), both with fused AdamW for the rest as in ours.
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
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.optimizer_peers import PEERS, PeerSet
from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.algorithms import ALGORITHMS
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.models import GPT, GPT_PLAN
from disttrain.optim import OptimizerSet, build_optimizer
from disttrain.optim.matrix_plan import MatrixUnit, build_plan, row_regions
from disttrain.optim.newton_schulz import newton_schulz_flops
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

WHOLE = ("muon", "normuon", "soap", "shampoo")
BF16 = {"name": "matrices", "match": ["role:matrices"], "algorithm": "muon", "compute_dtype": "bf16"}
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "element-wise": {
        BASELINE: {"preset": "adamw"},
        **{name: {"preset": name} for name in ALGORITHMS if name not in (BASELINE, *WHOLE)},
        "adamw, bf16 states": {"preset": "adamw", "state_dtype": "bf16"},
        "adamw, int8 states": {"preset": "adamw", "state_dtype": "int8"},
        "torch.optim.NAdam, adapted": {
            "groups": [{"name": "all", "match": [".*"], "algorithm": "torch.optim.NAdam", "lr": 1e-3}]
        },
    },
    "whole matrices": {
        BASELINE: {"preset": "adamw"},
        **{name: {"preset": name} for name in WHOLE},
        "muon in bf16": {"groups": [BF16, {"name": "rest", "match": [".*"]}]},
        **{peer: {"peer": peer} for peer in PEERS},
    },
}


class Case:
    """One optimizer over a model of its own, with gradients that stay what they are."""

    def __init__(self, world: int, settings: dict[str, Any]) -> None:
        parallel = ParallelConfig(strategy="fsdp")
        mesh = build_mesh(ParallelDims.resolve("fsdp", None, None, world), "cpu")
        self.gpt, _ = build_model(MODEL, max_length=LENGTH, mesh=mesh, parallel=parallel, seed=0, device=CPU)
        self.optimizer: OptimizerSet | PeerSet = (
            PeerSet(self.gpt, settings["peer"])
            if "peer" in settings
            else build_optimizer(self.gpt, OptimConfig.model_validate(settings), GPT_PLAN)
        )
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

    def held_state_bytes(self) -> int:
        """What this rank holds of the state."""
        tensors = (value for state in self.optimizer.state.values() for value in tree_leaves(state))
        held = [local(value) for value in tensors if isinstance(value, torch.Tensor)]
        return sum(value.numel() * value.element_size() for value in held)


# What ranks do.


def measure(rank: int, world: int, rounds: int, table: str) -> dict[str, Any]:
    cases = {name: Case(world, settings) for name, settings in TABLES[table].items()}
    updates: dict[str, Callable[[], None]] = {name: case.optimizer.step for name, case in cases.items()}
    updates[FLOOR], cases[FLOOR] = cases[BASELINE].add, cases[BASELINE]
    counted = {}
    for name, update in updates.items():
        for _ in range(2):  # SOAP's first step only looks
            cases[name].with_gradients()
            with FlopCounterMode(display=False) as flops, CollectiveCounter() as counter:
                update()
        calls, moved = sum(counter.calls.values()), sum(counter.bytes.values())
        counted[name] = {"calls": calls, "bytes": moved, "flops": flops.get_total_flops()}
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
    state = {name: case.held_state_bytes() for name, case in cases.items()}
    elements = sum(parameter.numel() for parameter in cases[BASELINE].parameters)
    return {"counted": counted, "seconds": measured, "state": state | {FLOOR: 0}, "elements": elements}


# What becomes of it.


def summarise(ranks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Wall time is that of rank 0, which waits for all; core time is the sum over ranks."""
    rows = {}
    for name in ranks[0]["counted"]:
        wall = [row[name][0] / row[BASELINE][0] for row in ranks[0]["seconds"]]
        rounds = zip(*(rank["seconds"] for rank in ranks), strict=True)
        cores = [sum(r[name][1] for r in row) / sum(r[BASELINE][1] for r in row) for row in rounds]
        rows[name] = {
            "step_time": [statistics.median(wall), min(wall), max(wall)],
            "core_time": [statistics.median(cores), min(cores), max(cores)],
            "calls": ranks[0]["counted"][name]["calls"],
            "bytes": sum(rank["counted"][name]["bytes"] for rank in ranks),
            "gflop_of_the_dearest_rank": max(rank["counted"][name]["flops"] for rank in ranks) / 1e9,
            "gflop_of_all_ranks": sum(rank["counted"][name]["flops"] for rank in ranks) / 1e9,
            "state_bytes_per_parameter": sum(rank["state"][name] for rank in ranks) / ranks[0]["elements"],
        }
    return rows


def markdown(results: dict[str, Any]) -> str:
    lines = ["# Optimizers on shards", "", f"`{results['command']}`: {results['what']}", ""]
    columns = "step time | core time | collectives | bytes | GFLOP, dearest rank | of all | state bytes per parameter |"
    for title, worlds in results["tables"].items():
        for world, rows in worlds.items():
            lines += [f"## {title.capitalize()}, world {world}", "", f"| optimizer | {columns}", "|---" * 8 + "|"]
            for name, row in rows.items():
                times = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in (row["step_time"], row["core_time"])]
                flops = f"{row['gflop_of_the_dearest_rank']:.2f} | {row['gflop_of_all_ranks']:.2f}"
                numbers = f"{row['calls']} | {row['bytes']:,} | {flops} | {row['state_bytes_per_parameter']:.2f}"
                lines.append(f"| {name} | {times[0]} | {times[1]} | {numbers} |")
            lines.append("")
    lines += ["## Owners of GPT-2 small's matrices", "", *(f"- {line}" for line in results["owners"]), ""]
    return "\n".join(lines)


def owners_of_gpt2_small() -> list[str]:
    """What `muon` would exchange on 8, 64 and 256 shards in fp32; planned without processes."""
    model = ModelConfig(n_layers=12, d_model=768, n_heads=12, vocab_size=50257)
    with torch.device("meta"):
        shapes = {n: (p.shape[0], p.shape[1]) for n, p in GPT(model, 1024).blocks.named_parameters() if p.dim() == 2}
    lines = []
    for shards in (8, 64, 256):
        units = [
            MatrixUnit(name, shape, row_regions(shape, shards), newton_schulz_flops(*shape, 5))
            for name, shape in shapes.items()
        ]
        lines.append(build_plan(units, shards=shards).summary())
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    worlds = [world for world in WORLDS if world <= arguments.nproc]
    tables: dict[str, dict[str, Any]] = {}
    with RankPool(max_world=max(worlds)) as pool:
        for name in TABLES:
            for world in worlds:
                job = {"rounds": arguments.rounds, "table": name}
                ranks = pool.run("benchmarks.optimizers:measure", world, 1800, **job)
                tables.setdefault(name, {})[str(world)] = summarise(ranks)
    results = {
        "command": f"python benchmarks/optimizers.py --nproc {arguments.nproc} --rounds {arguments.rounds}",
        "what": "time of one update as a ratio to fused AdamW in the same round: median (lowest to highest)",
        "torch": torch.__version__,
        "tables": tables,
        "owners": owners_of_gpt2_small(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "optimizers.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "optimizers.md").write_text(markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
