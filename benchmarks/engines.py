"""Our engine beside others: `python benchmarks/engines.py`, a quarter of an hour on two cores.

One GPT of 5.9 million parameters, two microbatches a step, two gloo ranks of one thread each. The peers are in
`engine_peers.py` (`pip install 'disttrain[deepspeed,accelerate,peers]'`; what is missing is left out and named).
Ours run as `disttrain train` runs them, judged and clipped. Writes results/engines.json and .md. The columns:

- step time: the ratio to PyTorch's DDP within one round, in which every case takes one step on the same batch, in an
  order that is drawn anew; median of all rounds with the middle half of them. Tokens per second are its inverse;
- core time: the same of what all ranks' threads worked, which a busy machine disturbs less;
- peak: growth of the resident set of a fresh process over one step, from before the model was built, with the engine's
  packages imported and a toy step done; the largest rank, the median of fresh processes;
- tensors: bytes of the whole tensors of the collectives of one step (`CollectiveCounter`), of one rank;
- ring: what a rank sends of these on a ring: (W-1)/W of each, twice for an all-reduce;
- loopback: bytes on the loopback interface in one step, of all ranks; the least of several steps, as others use it.

Each of ours is paired with the fastest of the others that hold the same: the median of the rounds' ratios, with the
95 % interval that order statistics give. Exits 1 where the losses of the cases are not the same.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import engine_peers as peers
from benchmarks.strategies import MODEL, TOY, Seconds, return_freed_memory_at_once
from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig, Strategy
from disttrain.config.resilience import AnomalyConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer, build_safeguards
from disttrain.testing import RankPool
from disttrain.testing.collectives import CollectiveCounter
from disttrain.train.build import build_model
from disttrain.train.step import train_step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORLD, LENGTH, ROWS, ACCUMULATION = 2, 256, 1, 2
CPU = torch.device("cpu")
BASELINE = "PyTorch DDP"
TOLERANCE = 1e-4
"""Of losses, relative: fp32 sums in other orders, grown over a session's steps."""
SIZES = ("peak_bytes", "ring_bytes", "loopback_bytes")
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
Build = Callable[[ModelConfig], peers.Peer]


class Native:
    """Ours, as `build_training` makes it, without the noise scale's measurements."""

    def __init__(self, strategy: Strategy, model: ModelConfig) -> None:
        parallel = ParallelConfig(strategy=strategy)
        mesh = build_mesh(ParallelDims.resolve(strategy, None, None, dist.get_world_size()), "cpu")
        gpt, called = build_model(model, max_length=LENGTH, mesh=mesh, parallel=parallel, seed=0, device=CPU)
        optimizer = build_optimizer(gpt, OptimConfig(), GPT_PLAN)
        guards = build_safeguards(gpt, optimizer, OptimConfig(), GPT_PLAN, device=CPU, anomaly=AnomalyConfig())
        self.engine = NativeEngine(gpt, called, optimizer, parallel=parallel, device=CPU, safeguards=guards)

    def step(self, batch: peers.Batch) -> Tensor:
        result = train_step(self.engine, batch, lr_factor=1.0, device=CPU)
        return result.loss_sum / sum(labels.numel() for _, labels in batch)


class Case(NamedTuple):
    layout: str
    """What each rank holds; only cases that hold the same are compared."""
    package: str
    build: Build


def _plain(make: Callable[..., peers.Peer], **settings: Any) -> Build:
    return lambda model: make(peers.plain_gpt(model, LENGTH), **settings)


def _native(strategy: Strategy) -> Case:
    return Case(LAYOUTS[strategy], "torch", lambda model: Native(strategy, model))


LAYOUTS = {
    "ddp": "everything whole",
    "zero1": "optimizer state cut",
    "zero2": "gradients cut too",
    "fsdp": "weights cut too",
}
DEEPSPEED = {"batch": ROWS, "accumulation": ACCUMULATION}
CASES = {
    "native ddp": _native("ddp"),
    BASELINE: Case(LAYOUTS["ddp"], "torch", _plain(peers.PlainDDP)),
    "DeepSpeed ZeRO-0": Case(LAYOUTS["ddp"], "deepspeed", _plain(peers.DeepSpeed, stage=0, **DEEPSPEED)),
    "Accelerate DDP": Case(LAYOUTS["ddp"], "accelerate", _plain(peers.Accelerate, accumulation=ACCUMULATION)),
    "Fabric DDP": Case(LAYOUTS["ddp"], "lightning_fabric", _plain(peers.Fabric, sharded=False)),
    "native zero1": _native("zero1"),
    "PyTorch FSDP2, weights kept, one reduction": Case(
        LAYOUTS["zero1"], "torch", _plain(peers.PlainFSDP2, keep=True, reduce_each=False)
    ),
    "DeepSpeed ZeRO-1": Case(LAYOUTS["zero1"], "deepspeed", _plain(peers.DeepSpeed, stage=1, **DEEPSPEED)),
    "native zero2": _native("zero2"),
    "PyTorch FSDP2, weights kept": Case(LAYOUTS["zero2"], "torch", _plain(peers.PlainFSDP2, keep=True)),
    "DeepSpeed ZeRO-2": Case(LAYOUTS["zero2"], "deepspeed", _plain(peers.DeepSpeed, stage=2, **DEEPSPEED)),
    "native fsdp": _native("fsdp"),
    "PyTorch FSDP2": Case(LAYOUTS["fsdp"], "torch", _plain(peers.PlainFSDP2)),
    "DeepSpeed ZeRO-3": Case(LAYOUTS["fsdp"], "deepspeed", _plain(peers.DeepSpeed, stage=3, **DEEPSPEED)),
    "Fabric FSDP2": Case(LAYOUTS["fsdp"], "lightning_fabric", _plain(peers.Fabric, sharded=True)),
}


# What ranks do.


def prepare_process(rank: int, world: int) -> None:
    """What a launcher would have set, for packages that look there."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    os.environ.update({key: str(value) for key, value in local.items()}, DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")


def draw(seed: int, vocabulary: int) -> peers.Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (ACCUMULATION, ROWS, LENGTH), generator=generator)
    return [(part, part.roll(-1, 1)) for part in tokens]


def memory_and_traffic(rank: int, world: int, name: str) -> dict[str, Any]:
    """One case, in a process that has done nothing else."""
    return_freed_memory_at_once()
    prepare_process(rank, world)
    importlib.import_module(CASES[name].package)
    toy = CASES[name].build(TOY)
    for _ in range(2):
        toy.step(draw(rank, TOY.vocab_size or 0))
    del toy
    torch.set_num_threads(1)
    gc.collect()
    before = resident_bytes("VmRSS")
    case = CASES[name].build(MODEL)
    for _ in range(3):  # DDP orders its buckets by the first step; moments come with it
        case.step(draw(rank, MODEL.vocab_size or 0))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    case.step(draw(rank, MODEL.vocab_size or 0))
    peak = resident_bytes("VmHWM") - before
    with CollectiveCounter() as counter:
        case.step(draw(rank, MODEL.vocab_size or 0))
    loopback = min(_loopback_bytes(case, rank) for _ in range(4))
    return {"peak": peak, "bytes": dict(counter.bytes), "loopback": loopback}


def _loopback_bytes(case: peers.Peer, rank: int) -> int:
    batch = draw(rank, MODEL.vocab_size or 0)
    dist.barrier()
    before = int(LOOPBACK.read_text())
    case.step(batch)
    dist.barrier()
    return int(LOOPBACK.read_text()) - before


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def step_seconds(rank: int, world: int, names: list[str], rounds: int, session: int) -> list[dict[str, Any]]:
    """In each round every case takes one step on the same batch, in an order that all ranks draw alike."""
    prepare_process(rank, world)
    cases = {name: CASES[name].build(MODEL) for name in names}
    torch.set_num_threads(1)
    measured = []
    for index in range(-3, rounds):
        order = random.Random(1000 * session + index).sample(names, len(names))
        batch = draw(1_000_000 * session + 1000 * (index + 3) + rank, MODEL.vocab_size or 0)
        row: dict[str, Any] = {"loss": {}, "seconds": {}}
        for name in order:
            dist.barrier()
            began, worked = time.perf_counter(), time.process_time()
            loss = cases[name].step(batch)
            dist.barrier()
            row["seconds"][name] = Seconds(time.perf_counter() - began, time.process_time() - worked)
            row["loss"][name] = loss.item()
        measured.append(row)
    return measured[3:]


# What becomes of it.


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and order statistics between which the true one lies with 95 % (Binomial(n, 1/2))."""
    ordered, count = sorted(values), len(values)
    below, tail = -1, 0.0
    while below + 1 < count // 2 and tail + math.comb(count, below + 1) / 2**count <= 0.025:
        below += 1
        tail += math.comb(count, below) / 2**count
    rank = max(below, 0)
    return statistics.median(ordered), ordered[rank], ordered[count - 1 - rank]


def ring_bytes(tensors: dict[str, int], world: int) -> float:
    """What one rank sends."""
    times = {"all_reduce": 2.0}
    return sum(times.get(kind, 1.0) * moved for kind, moved in tensors.items()) * (world - 1) / world


def ratios(rows: list[dict[str, Seconds]], name: str, base: str, what: str) -> list[float]:
    return [getattr(row[name], what) / getattr(row[base], what) for row in rows]


def all_ranks(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Seconds]]:
    """Rounds of a session: the barriers end the steps of all ranks together, the cores' add up."""
    return [
        {
            name: Seconds(seconds.wall, sum(rank["seconds"][name].cores for rank in round_))
            for name, seconds in round_[0]["seconds"].items()
        }
        for round_ in zip(*ranks, strict=True)
    ]


def loss_difference(ranks: list[list[dict[str, Any]]]) -> float:
    """The largest relative distance of any case's loss from the baseline's, in any round."""
    rounds = [row["loss"] for rank in ranks for row in rank]
    return max(abs(loss / row[BASELINE] - 1) for row in rounds for loss in row.values())


def case_row(name: str, seen: list[list[dict[str, Any]]], rows: list[dict[str, Seconds]]) -> dict[str, Any]:
    """`seen`: for each fresh pair of processes what its ranks measured."""
    first = seen[0][0]
    times = {
        what: statistics.quantiles(ratios(rows, name, BASELINE, what), n=4, method="inclusive")
        for what in Seconds._fields
    }
    return {
        "layout": CASES[name].layout,
        "time": {what: [round(value, 3) for value in quartiles] for what, quartiles in times.items()},
        "tokens_per_second": round(1 / times["wall"][1], 3),
        "peak_bytes": int(statistics.median(max(rank["peak"] for rank in ranks) for ranks in seen)),
        "tensor_bytes": first["bytes"],
        "ring_bytes": int(ring_bytes(first["bytes"], len(seen[0]))),
        "loopback_bytes": min(rank["loopback"] for ranks in seen for rank in ranks),
    }


def pair(ours: str, cases: dict[str, dict[str, Any]], rows: list[dict[str, Seconds]]) -> dict[str, Any]:
    """Ours beside the best of the others of the same layout, by each measure."""
    others = [n for n in cases if cases[n]["layout"] == cases[ours]["layout"] and not n.startswith("native")]
    result: dict[str, Any] = {"ours": ours}
    for what in Seconds._fields:
        fastest = min(others, key=lambda name: cases[name]["time"][what][1])
        interval = median_interval(ratios(rows, ours, fastest, what))
        result[what] = {"fastest": fastest, "ratio": [round(value, 3) for value in interval]}
    for what in SIZES:
        least = min(others, key=lambda name: cases[name][what])
        result[what] = {"least": least, "ratio": round(cases[ours][what] / cases[least][what], 4)}
    return result


def measure(names: list[str], sessions: int, rounds: int, fresh: int, raw: dict[str, Any]) -> None:
    """Adds to `raw`: what fresh processes saw of each case, and rounds of step times."""
    for turn in range(fresh):
        for name in names:
            print(f"memory and traffic, {turn + 1} of {fresh}: {name}", flush=True)
            with RankPool(WORLD) as pool:
                seen = pool.run("benchmarks.engines:memory_and_traffic", WORLD, 300, name=name)
            raw["seen"].setdefault(name, []).append(seen)
    for turn in range(sessions):
        print(f"step times, {turn + 1} of {sessions}: {rounds} rounds of {len(names)} steps", flush=True)
        with RankPool(WORLD) as pool:
            job = {"names": names, "rounds": rounds, "session": raw["sessions"]}
            ranks = pool.run("benchmarks.engines:step_seconds", WORLD, 1800, **job)
        raw["sessions"] += 1
        raw["rounds"] += [{name: list(seconds) for name, seconds in row.items()} for row in all_ranks(ranks)]
        raw["loss_difference"] = max(raw["loss_difference"], loss_difference(ranks))


def summary(raw: dict[str, Any]) -> dict[str, Any]:
    names = list(raw["seen"])
    packages = sorted({CASES[name].package for name in names})
    rows = [{name: Seconds(*seconds) for name, seconds in row.items()} for row in raw["rounds"]]
    cases = {name: case_row(name, raw["seen"][name], rows) for name in names}
    return {
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "left_out": [name for name in CASES if name not in names],
        "model": MODEL.model_dump(exclude_unset=True),
        "step": {"ranks": WORLD, "microbatches": ACCUMULATION, "rows": ROWS, "sequence_length": LENGTH},
        "cases": cases,
        "pairs": [pair(name, cases, rows) for name in names if name.startswith("native")],
    }


def markdown(report: dict[str, Any]) -> str:
    step, raw = report["step"], report["raw"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"Made by `{'`, `'.join(report['commands'])}` with {versions}: {step['ranks']} gloo ranks, "
        f"{step['microbatches']} microbatches of {step['rows']} x {step['sequence_length']} tokens a step, "
        f"{len(raw['rounds'])} rounds in {raw['sessions']} pairs of processes. MB are 10^6 bytes. "
        "`benchmarks/engines.py` says what the columns are. "
        f"Losses of all cases agree to {raw['loss_difference']:.0e}.",
        "",
        "| case | each rank holds | step time / PyTorch DDP (middle half) | tokens per second | core time | peak (MB) "
        "| ring (MB) | loopback (MB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["cases"].items():
        times = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in row["time"].values()]
        cells = [name, row["layout"], times[0], f"{row['tokens_per_second']:.2f}", times[1]]
        lines.append(_line(*cells, *(f"{row[what] / 1e6:.1f}" for what in SIZES)))
    lines += [
        "",
        "| ours / the best of the others | step time [95 %] | core time [95 %] | peak | ring | loopback |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["pairs"]:
        times = [
            f"{middle:.3f} [{low:.3f}, {high:.3f}] of {row[what]['fastest']}"
            for what in Seconds._fields
            for middle, low, high in [row[what]["ratio"]]
        ]
        sizes = [f"{row[what]['ratio']:.3f} of {row[what]['least']}" for what in SIZES]
        lines.append(_line(row["ours"], *times, *sizes))
    if report["left_out"]:
        lines += ["", f"Left out, since their packages are not installed: {', '.join(report['left_out'])}."]
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=3, help="fresh pairs of processes for the step times")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each case in a session")
    parser.add_argument("--fresh", type=int, default=3, help="fresh pairs of processes for the memory of each case")
    parser.add_argument("--more", action="store_true", help="add to what results/engines.json has already")
    options = parser.parse_args()
    # Ranks import this file by its module name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    names = [name for name, case in CASES.items() if importlib.util.find_spec(case.package)]
    before = json.loads((RESULTS / "engines.json").read_text()) if options.more else {}
    raw = before.get("raw", {"seen": {}, "rounds": [], "sessions": 0, "loss_difference": 0.0})
    measure(names, options.sessions, options.rounds, options.fresh, raw)
    if len(raw["rounds"]) < 6 or not raw["seen"]:
        parser.error("an interval of 95 % needs at least 6 rounds in all, and memory one fresh pair")
    command = " ".join(["python benchmarks/engines.py", *sys.argv[1:]])
    report = {"commands": [*before.get("commands", []), command], **summary(raw), "raw": raw}
    text = markdown(report)
    print(text)
    (RESULTS / "engines.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    (RESULTS / "engines.md").write_text(text, encoding="utf-8")
    if different := raw["loss_difference"] > TOLERANCE:
        print(f"losses differ by {raw['loss_difference']:.1e}: the cases do not do the same work", file=sys.stderr)
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
