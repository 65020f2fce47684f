"""A synthetic run folder with everything that a report can show: a failure and its restart, clipped steps, warnings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from tests.report.example_rows import LAYERS, RANKS, START_UNIX_SECONDS, Example, Row, log_row, seconds_at, smooth_loss

OLD = {"step", "tokens", "loss", "grad_norm", "lr", "clip_scale", "clip_share", "tokens_per_second", "step_seconds"}
SAMPLE = "def tokens(text):\n    </script><script>alert('sample')</script>\n    return [<b>text</b> & more]"


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
