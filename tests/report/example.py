"""A synthetic run folder with everything that a report can show: a failure and its restart, clipped steps, warnings."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GROUPS = ("matrices", "embeddings", "no_decay")
LAYERS = 12
RANKS = 8
START_UNIX_SECONDS = 1_750_000_000.0
EDGES = [round(0.3 * 1.025**n, 5) for n in range(61)]
SAMPLE = "def tokens(text):\n    </script><script>alert('sample')</script>\n    return [<b>text</b> & more]"

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """`rows` log rows, `log_every` steps apart. `final_loss` and `seed` make runs that differ."""

    name: str = "gpt-124m-muon"
    rows: int = 400
    log_every: int = 10
    seed: int = 0
    final_loss: float = 3.1
    lr: float = 0.02
    units: int = 24
    columns: str = "all"
    """`all`, or `old`: what runs logged before there were clocks, memory and the parts of a step."""

    @property
    def steps(self) -> int:
        return self.rows * self.log_every


def write_example(folder: Path, example: Example | None = None) -> Path:
    """Make the run folder `folder`."""
    example = example or Example()
    folder.mkdir(parents=True)
    rows = metrics(example)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 4010, "tok')
    write_json(folder / "config.json", config(example, folder))
    write_json(folder / "status.json", status(example))
    write_json(folder / "ownership.json", ownership())
    (folder / "samples.txt").write_text(
        f"--- step {example.steps // 2}\nfo the\n\n--- step {example.steps}\n{SAMPLE}\n"
    )
    if example.columns == "all":
        write_json(folder / "environment.json", environment())
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events(example)))
        (folder / "trace").mkdir()
        write_json(folder / "trace" / "summary.json", profile())
    return folder


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def metrics(example: Example) -> list[Row]:
    random = np.random.default_rng(example.seed)
    rows: list[Row] = []
    for index in range(example.rows):
        step = 1 if index == 0 else index * example.log_every
        row = log_row(example, step, index, random)
        if example.columns == "old":
            row = {key: value for key, value in row.items() if key in OLD or key.split("/")[0] in OLD}
        rows.append(row)
        if index and index % max(1, example.rows // 20) == 0:
            loss = smooth_loss(example, step)
            known = {key: row[key] for key in ("step", "tokens", "unix_seconds") if key in row}
            rows.append(known | {"validation_loss": loss + 0.08, "validation_bits_per_byte": loss / 2.9})
            cost = {"checkpoint_bytes": 1_490_000_000, "checkpoint_stall_seconds": 0.21 + 0.05 * random.random()}
            rows.append(known | {"checkpoint_step": step} | cost | {"checkpoint_write_seconds": 6 + random.random()})
    return rows


OLD = {"step", "tokens", "loss", "grad_norm", "lr", "clip_scale", "clip_share", "tokens_per_second", "step_seconds"}


def smooth_loss(example: Example, step: int) -> float:
    done = step / example.steps
    return example.final_loss + 7.6 * math.exp(-14 * done) + 0.5 * (1 - done)


def seconds_at(example: Example, step: int) -> float:
    """After the start; the run stood still for eight minutes after it had failed at its middle."""
    return START_UNIX_SECONDS + 0.52 * step + 40 + (480 if step > example.steps * 0.45 else 0)


def log_row(example: Example, step: int, index: int, random: np.random.Generator) -> Row:
    done = step / example.steps
    batch = 262_144 if done < 0.3 else 524_288
    loss = smooth_loss(example, step) + random.normal(0, 0.035)
    spike = index > 4 and index % 59 == 0
    slow = 0.65 < done < 0.75
    step_seconds = 0.50 + 0.03 * random.random() + (0.35 if spike else 0)
    row: Row = {
        "step": step,
        "tokens": int(step * 262_144 + max(0.0, done - 0.3) * example.steps * 262_144),
        "unix_seconds": seconds_at(example, step),
        "loss": "nan" if index == 211 else loss + (0.9 if spike else 0),
        "grad_norm": 0.0,
        "valid_tokens": batch,
        "global_batch_tokens": batch,
        "tokens_per_second": batch / step_seconds,
        "model_flops_per_second": batch / step_seconds * 0.86e9,
        "mfu": batch / step_seconds * 0.86e9 / 1.98e15,
        "step_seconds": step_seconds,
        "seconds_left": (example.steps - step) * 0.52,
        "skipped_steps": index // 150,
        "max_attention_logit": 0.0,
    }
    row |= step_part_columns(step_seconds, spike, random) | resource_columns(done, random)
    row |= noise_columns(done, random) | group_columns(example, done, spike, random)
    row |= unit_columns(example, done, spike, random) | attention_columns(done, random)
    row |= {
        f"rank/{rank}/step_seconds": step_seconds * (1 + 0.02 * random.random()) * (1.3 if rank == 3 and slow else 1)
        for rank in range(RANKS)
    }
    row["grad_norm"] = math.sqrt(sum(row[f"grad_norm/{group}"] ** 2 for group in GROUPS))
    times = random.normal(step_seconds, 0.02, example.log_every * RANKS)
    counts, _ = np.histogram(times, EDGES)
    row["step_seconds_histogram"] = {"edges": EDGES, "counts": counts.tolist()}
    return row


def step_part_columns(step_seconds: float, spike: bool, random: np.random.Generator) -> Row:
    parts = {"data": 0.01, "forward": 0.27, "backward": 0.5, "optimizer": 0.08, "communication": 0.07}
    found = {f"{name}_seconds": share * (0.47 + 0.03 * random.random()) for name, share in parts.items()}
    found["checkpoint_seconds"] = 0.3 if spike else 0.0
    found["evaluation_seconds"] = 0.02
    return found


def resource_columns(done: float, random: np.random.Generator) -> Row:
    return {
        "goodput": 0.97 - 0.12 * (done > 0.45) * (1 - done) - 0.01 * random.random(),
        "peak_allocated_bytes": 41.2e9 + 6e9 * (done > 0.3),
        "peak_reserved_bytes": 46.8e9 + 7e9 * (done > 0.3),
        "host_rss_bytes": 5.1e9 + 4e8 * done,
        "loss_scale": 2.0 ** (12 + int(done * 4)),
    }


def noise_columns(done: float, random: np.random.Generator) -> Row:
    noise = 60_000 * math.exp(3.2 * done) * math.exp(random.normal(0, 0.25))
    return {"noise_scale_tokens": noise, "suggested_batch_tokens": round(noise / 65_536 + 1) * 65_536}


def group_columns(example: Example, done: float, spike: bool, random: np.random.Generator) -> Row:
    rate = example.lr * min(1.0, done / 0.05) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    row: Row = {"lr": rate, "clip_threshold": 1.0}
    for position, group in enumerate(GROUPS):
        usual = (0.7, 0.3, 0.12)[position] * (1 + 4 * math.exp(-30 * done))
        norm = usual * math.exp(random.normal(0, 0.12)) * (6 if spike and position < 2 else 1)
        threshold = usual * (2.6 - 1.2 * done)
        rms = 0.02 * (1 + done) / (1 + position)
        row |= {
            f"lr/{group}": rate if position == 0 else rate / 10,
            f"grad_norm/{group}": norm,
            f"clip_threshold/{group}": threshold,
            f"clip_scale/{group}": min(1.0, threshold / norm),
            f"clip_share/{group}": 0.1 * (norm > threshold) + 0.1 * (spike and position < 2),
            f"param_rms/{group}": rms,
            f"update_rms/{group}": rms * rate * (0.2 + 0.02 * random.random()),
            f"update_ratio/{group}": rate * (0.2 + 0.02 * random.random()),
        }
    return row


def unit_columns(example: Example, done: float, spike: bool, random: np.random.Generator) -> Row:
    row: Row = {}
    for unit in range(example.units):
        norm = 0.1 * (1 + unit / 12) * math.exp(random.normal(0, 0.2)) * (5 if spike and unit % 5 == 0 else 1)
        row[f"unit_norm/blocks.{unit}"] = norm
        if done > 0.02:
            threshold = 0.18 * (1 + unit / 12) * (1.3 - 0.4 * done)
            row[f"unit_threshold/blocks.{unit}"] = threshold
            row[f"unit_scale/blocks.{unit}"] = min(1.0, threshold / norm)
            row[f"unit_clip_share/blocks.{unit}"] = 0.1 * (norm > threshold)
    return row


def attention_columns(done: float, random: np.random.Generator) -> Row:
    def logit(layer: int) -> float:
        return (12 + 9 * layer) * (0.3 + min(1.0, 2 * done)) * (1 + 0.05 * random.normal())

    logits = {f"max_attention_logit/{layer}": min(103.0, logit(layer)) for layer in range(LAYERS)}
    largest = max(logits.values())
    scale = min(1.0, 100 / largest)
    return {"max_attention_logit": largest, "qk_clip_heads": 3.0 * (scale < 1), "qk_clip_scale": scale} | logits


def config(example: Example, folder: Path) -> Row:
    return {
        "device": "cuda",
        "run": {"name": example.name, "dir": str(folder), "resume": "auto"},
        "model": {"n_layers": LAYERS, "d_model": 768, "n_heads": 12, "vocab_size": 50_304, "norm": "rmsnorm"},
        "data": {"source": "shards", "path": "data/web.bin", "tokenizer": "gpt2"},
        "train": {
            "steps": example.steps,
            "tokens": None,
            "sequence_length": 1024,
            "seed": example.seed,
            "nproc": RANKS,
        },
        "parallel": {"strategy": "fsdp", "param_dtype": "bf16", "compile": True},
        "optim": {"preset": "muonclip", "lr": example.lr, "qk_clip": {"threshold": 100.0, "alpha": 0.5}, "groups": []},
        "monitor": {"log_every": example.log_every, "evaluate_every": 200},
    }


def status(example: Example) -> Row:
    if example.columns == "old":
        return {"state": "completed", "step": example.steps}
    lost = {"restart": 480.0, "recomputed_steps": 104.0, "checkpoint": 61.0, "evaluation": 88.0, "startup": 40.0}
    productive = 0.52 * example.steps
    wall = productive + sum(lost.values())
    shared = {"goodput": productive / wall, "productive_seconds": productive, "wall_seconds": wall}
    return {"state": "completed", "step": example.steps, "lost_seconds": lost} | shared


def ownership() -> Row:
    def row(parameter: str, group: str, shape: list[int], algorithm: str, clip: str) -> Row:
        elements = math.prod(shape)
        fixed = {"optimizer_class": f"disttrain.optim.{algorithm}", "placement": "rows over 8"}
        settings = "lr 0.02, momentum 0.95" if algorithm == "muon" else "lr 0.002, betas (0.9, 0.95)"
        sizes = {"shape": shape, "elements": elements, "state_bytes": 4 * elements, "settings": settings}
        return {"parameter": parameter, "group": group, "algorithm": algorithm, "clip": clip} | fixed | sizes

    rows = [row("wte.weight", "embeddings", [50_304, 768], "adamw", "adaptive, 4 to 2 deviations")]
    for layer in range(LAYERS):
        for name, shape in (("attention.qkv", [2304, 768]), ("attention.out", [768, 768]), ("mlp.up", [3072, 768])):
            rows.append(row(f"blocks.{layer}.{name}.weight", "matrices", shape, "muon", "adaptive, 4 to 2 deviations"))
        rows.append(row(f"blocks.{layer}.norm.weight", "no_decay", [768], "adamw", "none"))
    return {"parameters": rows, "matrix_exchanges": [["rank 0: 5 matrices, 8.1 MB out", "rank 1: 4 matrices"]]}


def environment() -> Row:
    shown = {"python": "3.11.9", "torch": "2.13.0", "disttrain": "0.1.0", "code_version": "1f0c2ab", "host": "node-07"}
    return shown | {"device": "NVIDIA H100 80GB", "world": RANKS, "command": "disttrain train gpt-124m.toml --nproc 8"}


def events(example: Example) -> list[Row]:
    """The run fails after its middle, comes back at the last checkpoint, and repeats what was lost."""
    fails, returns = int(example.steps * 0.45) + 55, int(example.steps * 0.45)
    found: list[tuple[float, int, str, str]] = [(START_UNIX_SECONDS, 0, "start", "8 ranks on node-07")]
    for step in range(200, example.steps + 1, max(200, example.steps // 20)):
        found.append((seconds_at(example, step) + 1, step, "checkpoint", "1,490.0 MB written in 6.4 s"))
    failed = seconds_at(example, returns) + 0.52 * 55
    found += [
        (
            seconds_at(example, 570),
            570,
            "warning",
            "the gradient of blocks.5 was cut below one half in 3 steps in a row",
        ),
        (failed, fails, "lost_rank", "rank 5 on node-07 stopped answering (<no heartbeat>)"),
        (failed + 60, fails, "failed", "NCCL: a remote process ended"),
        (failed + 430, returns, "restart", "7 hosts left; 8 ranks again"),
        (failed + 440, returns, "resume", f"from step-{returns:08}"),
        (seconds_at(example, int(example.steps * 0.7)), int(example.steps * 0.7), "slow_rank", "rank 3: 1.4 x median"),
        (seconds_at(example, int(example.steps * 0.8)), int(example.steps * 0.8), "meteor", "a kind nobody knows"),
        (seconds_at(example, example.steps) + 5, example.steps, "completed", f"step {example.steps}"),
    ]
    keys = ("unix_seconds", "step", "kind", "text")
    return [dict(zip(keys, event, strict=True)) for event in sorted(found, key=lambda event: event[0])]


def profile() -> Row:
    names = ("aten::mm", "ncclDevKernel_ReduceScatter", "flash_fwd_kernel", "flash_bwd_kernel", "aten::copy_")
    rows = [
        {"name": name, "calls": 96 * (index + 1), "self_seconds": 0.4 / 2**index, "share": 0.5 / 2**index}
        for index, name in enumerate((*names, "aten::add_", "void at::native<float, 4>", "aten::mul", "a", "b"))
    ]
    times = {"step_seconds": 0.51, "communication_seconds": 0.12, "exposed_communication_seconds": 0.034}
    return {"steps": [100, 104], "world": RANKS, "operators": rows} | times
