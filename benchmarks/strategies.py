"""What strategies and memory settings cost: `python benchmarks/strategies.py [--nproc 4]`, minutes on two cores.

One GPT of 5.9 million parameters, two microbatches a step, on gloo. Writes results/strategies.json and .md. Exits 1
where counted bytes differ from the formulas of docs/strategies.md. What the columns are:

- all-gather, reduce-scatter, all-reduce: bytes of the whole tensors of one step (`CollectiveCounter`), and the formula;
- held: this rank's parts of parameters, gradients and optimizer state between steps, the largest rank, and its formula;
- alive: bytes of all tensor storages that exist between steps (DDP's gradients stay in its buckets, so they are held);
- peak: most bytes of tensor storages alive at the end of any operation of a step (`LiveTensors`), exact and the same in
  every run. It leaves out scratch memory inside an operation and what the allocator loses;
- process peak: growth of the resident set of a fresh process over what it had before the model was built, with torch
  and its libraries warmed up by a toy. It has all that `peak` leaves out, and gloo's buffers, and differs a little
  between runs: it is here to show that `peak` can be believed;
- step time: the ratio to the baseline (ddp; for settings fsdp without any) within one round, in which every case takes
  one step; the median of the rounds with their lowest and highest. Processes share cores, and loopback is the network;
- core time: the same of what all ranks' threads worked, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.parallel.precision import DTYPES
from disttrain.testing import RankPool
from disttrain.testing.collectives import CollectiveCounter, sharded_traffic
from disttrain.train.build import build_model
from disttrain.train.step import train_step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ModelConfig(n_layers=6, d_model=256, n_heads=4, vocab_size=4096)
TOY = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=64)
LENGTH, ROWS, ACCUMULATION = 256, 4, 2
CPU = torch.device("cpu")
KINDS = ("all_gather", "reduce_scatter", "all_reduce")
COUNT_BYTES = 4 * 8
"""All-reduced in every step: counts of tokens, wishes to stop, ranks still saving, chunks. And a norm per parameter."""
M_MMAP_THRESHOLD = -3

Settings = dict[str, Any]
Shapes = list[tuple[int, ...]]


class Seconds(NamedTuple):
    """Of one step: until the last rank is done, and of this rank's cores."""

    wall: float
    cores: float


def strategies(nproc: int) -> dict[str, Settings]:
    return {
        "ddp": {"strategy": "ddp"},
        "zero1": {"strategy": "zero1"},
        "zero2": {"strategy": "zero2"},
        "fsdp sharded": {"strategy": "fsdp", "grad_accumulation": "sharded"},
        "fsdp unsharded": {"strategy": "fsdp", "grad_accumulation": "unsharded"},
        f"hsdp 2x{nproc // 2}": {"strategy": "hsdp", "dp_replicate": 2},
    }


MEMORY_SETTINGS: dict[str, Settings] = {
    "none": {},
    "activation_checkpointing = full": {"activation_checkpointing": "full"},
    "activation_checkpointing = every_n, 2": {
        "activation_checkpointing": "every_n",
        "activation_checkpointing_every": 2,
    },
    "activation_checkpointing = selective": {"activation_checkpointing": "selective"},
    "loss_chunk_tokens = 128": {"loss_chunk_tokens": 128},
    "full and loss_chunk_tokens = 128": {"activation_checkpointing": "full", "loss_chunk_tokens": 128},
    "param_dtype = bf16": {"param_dtype": "bf16"},
}
"""Each under fsdp sharded."""


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensor storages that operations of this thread have touched and that still exist: now, and at most.

    Storages are looked at again after every operation, since FSDP2 empties and refills its buffers in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages = WeakIdKeyDictionary()
        self.peak = 0

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self._storages)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._storages[_local(leaf).untyped_storage()] = None
        self.peak = max(self.peak, self.now)
        return result


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


# What ranks do.


def build_engine(world: int, settings: Settings, model: ModelConfig = MODEL) -> NativeEngine:
    parallel = ParallelConfig(**settings)
    dims = ParallelDims.resolve(parallel.strategy, parallel.dp_replicate, parallel.dp_shard, world)
    mesh = build_mesh(dims, "cpu")
    gpt, called = build_model(model, max_length=LENGTH, mesh=mesh, parallel=parallel, seed=0, device=CPU)
    optimizer = build_optimizer(gpt, OptimConfig(), GPT_PLAN)
    return NativeEngine(gpt, called, optimizer, parallel=parallel, device=CPU)


def take_step(engine: NativeEngine, rank: int, rows: int = ROWS, length: int = LENGTH, vocabulary: int = 4096) -> None:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(vocabulary, (ACCUMULATION, rows, length), generator=generator)
    train_step(engine, [(part, part.roll(-1, 1)) for part in tokens], lr_factor=1.0, device=CPU)


def prepare(engine: NativeEngine, rank: int, vocabulary: int = 4096) -> None:
    """DDP orders its buckets by what it saw in the first step, and agrees on them in the second."""
    for _ in range(2):
        take_step(engine, rank, rows=1, length=8, vocabulary=vocabulary)


def memory_and_traffic(rank: int, world: int, settings: Settings) -> dict[str, Any]:
    """One step of one case, in a process that has done nothing else."""
    return_freed_memory_at_once()
    prepare(build_engine(world, settings, TOY), rank, vocabulary=64)
    gc.collect()
    before = peak_resident_bytes()
    with LiveTensors() as live:
        engine = build_engine(world, settings)
        prepare(engine, rank)
        gc.collect()
        live.peak = 0
        with CollectiveCounter() as counter:
            take_step(engine, rank)
        gc.collect()
    process_peak = peak_resident_bytes() - before
    shapes = {name: tuple(parameter.shape) for name, parameter in engine.module.named_parameters()}
    shards = world // (settings.get("dp_replicate") or 1)
    moved = sharded_traffic(counter, shards)[1]
    return {
        "bytes": {kind: moved.get(kind, 0) for kind in KINDS},
        "others": sorted(set(moved) - set(KINDS)),
        "held": held_bytes(engine),
        "alive": live.now,
        "peak": live.peak,
        "process_peak": process_peak,
        "shapes": [*shapes.values()],
        "root_shapes": [shape for name, shape in shapes.items() if not name.startswith("blocks.")],
    }


def held_bytes(engine: NativeEngine) -> int:
    """Of this rank's parameters, gradients and optimizer state."""
    parameters = list(engine.module.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    return sum(_local(t).numel() * t.element_size() for t in (*parameters, *gradients, *states))


def return_freed_memory_at_once() -> None:
    """Else glibc keeps freed tensors for later ones, and the resident set says what was once needed, not what is."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)


def peak_resident_bytes() -> int:
    """ru_maxrss is in KiB on Linux, in bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step_seconds(rank: int, world: int, cases: dict[str, Settings], rounds: int) -> list[dict[str, Seconds]]:
    """In each round every case takes one step, in an order that turns from round to round."""
    engines = {name: build_engine(world, settings) for name, settings in cases.items()}
    for engine in engines.values():
        prepare(engine, rank)
        take_step(engine, rank, rows=1)
    names, measured = list(engines), []
    for index in range(rounds):
        turn = index * len(names) // rounds
        seconds: dict[str, Seconds] = {}
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            began, worked = time.perf_counter(), time.process_time()
            take_step(engines[name], rank)
            dist.barrier()
            seconds[name] = Seconds(time.perf_counter() - began, time.process_time() - worked)
        measured.append(seconds)
    return measured


# What they should have sent and held.


def formula_bytes(settings: Settings, world: int, shapes: Shapes, root_shapes: Shapes) -> dict[str, int]:
    """The table of docs/strategies.md."""
    parallel = ParallelConfig(**settings)
    shards = world // (parallel.dp_replicate or 1)
    gathered, reduced = _itemsize(parallel.param_dtype), _itemsize(parallel.reduce_dtype)
    padded, root = (
        sum(math.ceil(rows / shards) * shards * math.prod(rest) for rows, *rest in part)
        for part in (shapes, root_shapes)
    )
    sent = dict.fromkeys(KINDS, 0)
    sent["all_reduce"] = COUNT_BYTES + 8 * (2 + len(shapes))
    if parallel.strategy == "ddp":
        sent["all_reduce"] += reduced * sum(map(math.prod, shapes))
        return sent
    fsdp = parallel.strategy in ("fsdp", "hsdp")
    each = parallel.strategy == "zero2" or (fsdp and parallel.grad_accumulation != "unsharded")
    sent["all_gather"] = gathered * (ACCUMULATION * (2 * padded - root) if fsdp else padded)
    sent["reduce_scatter"] = reduced * padded * (ACCUMULATION if each else 1)
    if parallel.strategy == "hsdp":
        sent["all_reduce"] += reduced * padded // shards
    return sent


def _itemsize(precision: str) -> int:
    return (DTYPES[precision] or torch.float32).itemsize


def formula_held(settings: Settings, world: int, shapes: Shapes) -> int:
    """12 bytes for each element of the largest shard, 16 under ddp, whose gradients stay, and a step count for each."""
    shards = 1 if settings["strategy"] == "ddp" else world // settings.get("dp_replicate", 1)
    each = 16 if settings["strategy"] == "ddp" else 12
    return sum(each * math.ceil(rows / shards) * math.prod(rest) + 4 for rows, *rest in shapes)


# Tables.


def measure(nproc: int, rounds: int) -> dict[str, Any]:
    by_strategy = strategies(nproc)
    base = by_strategy["fsdp sharded"]
    by_setting = {name: {**base, **extra} for name, extra in MEMORY_SETTINGS.items()}
    cases = {**by_strategy, **{name: s for name, s in by_setting.items() if name != "none"}}
    seen = {}
    for name, settings in cases.items():
        with RankPool(nproc) as pool:
            print(f"memory and traffic: {name}", flush=True)
            seen[name] = pool.run("benchmarks.strategies:memory_and_traffic", nproc, 300, settings=settings)
    with RankPool(nproc) as pool:
        print(f"step times: {rounds} rounds of {len(cases)} steps", flush=True)
        by_rank = pool.run("benchmarks.strategies:step_seconds", nproc, 900, cases=cases, rounds=rounds)
    seen["none"] = seen["fsdp sharded"]
    seconds = [in_all(ranks) for ranks in zip(*by_rank, strict=True)]
    return {
        "torch": torch.__version__,
        "nproc": nproc,
        "rounds": rounds,
        "parameters": sum(map(math.prod, seen["ddp"][0]["shapes"])),
        "model": MODEL.model_dump(exclude_unset=True),
        "step": {"sequence_length": LENGTH, "microbatch_size": ROWS, "microbatches": ACCUMULATION},
        "strategies": [row(name, s, seen[name], ratios(seconds, name, "ddp")) for name, s in by_strategy.items()],
        "memory": [row(name, s, seen[name], ratios(seconds, name, "none")) for name, s in by_setting.items()],
    }


def in_all(ranks: tuple[dict[str, Seconds], ...]) -> dict[str, Seconds]:
    """A round's seconds: the barriers end the steps of all ranks together, the cores' add up."""
    first = ranks[0]
    seconds = {name: Seconds(first[name].wall, sum(rank[name].cores for rank in ranks)) for name in first}
    return {**seconds, "none": seconds["fsdp sharded"]}


def ratios(seconds: list[dict[str, Seconds]], name: str, baseline: str) -> dict[str, dict[str, float]]:
    """Within each round, of wall and of cores' time: median, lowest and highest."""
    spreads = {}
    for index, what in enumerate(Seconds._fields):
        values = sorted(timed[name][index] / timed[baseline][index] for timed in seconds)
        spread = {"median": statistics.median(values), "lowest": values[0], "highest": values[-1]}
        spreads[what] = {key: round(value, 3) for key, value in spread.items()}
    return spreads


def row(name: str, settings: Settings, ranks: list[dict[str, Any]], times: dict[str, Any]) -> dict[str, Any]:
    """One case: the largest rank's bytes, and whether they are those of the formulas."""
    world, shapes = len(ranks), ranks[0]["shapes"]
    sent, held = formula_bytes(settings, world, shapes, ranks[0]["root_shapes"]), formula_held(settings, world, shapes)
    counted_held = max(rank["held"] for rank in ranks)
    return {
        "case": name,
        "settings": settings,
        "sent_bytes": ranks[0]["bytes"],
        "sent_formula_bytes": sent,
        "held_bytes": counted_held,
        "held_formula_bytes": held,
        "alive_bytes": max(rank["alive"] for rank in ranks),
        "peak_bytes": max(rank["peak"] for rank in ranks),
        "process_peak_bytes": max(rank["process_peak"] for rank in ranks),
        "step_time_ratio": times,
        "agrees": counted_held == held and all(rank["bytes"] == sent and not rank["others"] for rank in ranks),
    }


def markdown(report: dict[str, Any]) -> str:
    step = report["step"]
    lines = [
        f"Made by `{report['command']}` with torch {report['torch']}: {report['nproc']} processes on gloo, "
        f"{report['parameters']:,} parameters, {step['microbatches']} microbatches of {step['microbatch_size']} x "
        f"{step['sequence_length']} tokens a step. MB are 10^6 bytes, of the largest rank; "
        "`benchmarks/strategies.py` says what the columns are.",
        "",
        "| strategy | all-gather: counted, formula (MB) | reduce-scatter | all-reduce | held: counted, formula (MB) "
        "| alive between steps (MB) | peak (MB) | process peak (MB) | step time / ddp (lowest to highest) "
        "| core time / ddp |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["strategies"]:
        pairs = [(case["sent_bytes"][kind], case["sent_formula_bytes"][kind]) for kind in KINDS]
        pairs.append((case["held_bytes"], case["held_formula_bytes"]))
        cells = [f"{_mb(counted)}, {_mb(formula)}" for counted, formula in pairs]
        lines.append(_line(case["case"], *cells, _mb(case["alive_bytes"]), *_peaks(case)))
    lines += [
        "",
        "| setting, under fsdp sharded | peak (MB) | process peak (MB) | step time / none (lowest to highest) "
        "| core time / none |",
        "|---|---|---|---|---|",
    ]
    lines += [_line(case["case"], *_peaks(case)) for case in report["memory"]]
    return "\n".join(lines) + "\n"


def _peaks(case: dict[str, Any]) -> list[str]:
    spreads = (case["step_time_ratio"][what] for what in Seconds._fields)
    times = [f"{s['median']:.2f} ({s['lowest']:.2f} to {s['highest']:.2f})" for s in spreads]
    return [_mb(case["peak_bytes"]), _mb(case["process_peak_bytes"]), *times]


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Bytes, memory and step time of every strategy and memory setting.")
    parser.add_argument("--nproc", type=int, default=4, help="processes; even, since hsdp makes two copies")
    parser.add_argument("--rounds", type=int, default=5, help="steps that each case is timed for")
    options = parser.parse_args()
    if options.nproc < 2 or options.nproc % 2 or options.rounds < 1:
        parser.error("--nproc must be even and --rounds at least 1")
    # Ranks import this file by its module name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = f"python benchmarks/strategies.py --nproc {options.nproc} --rounds {options.rounds}"
    report = {"command": command, **measure(options.nproc, options.rounds)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "strategies.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "strategies.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    wrong = [case["case"] for case in (*report["strategies"], *report["memory"]) if not case["agrees"]]
    for name in wrong:
        print(f"counted bytes are not those of the formula: {name}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
