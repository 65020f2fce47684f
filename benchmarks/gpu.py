"""Everything that waits for a GPU, in one go: `python benchmarks/gpu.py`.

Runs the tests marked gpu, the parity table on nccl, and a short training run; writes benchmarks/results/gpu.json with
the command, exit code and last lines of each. Exits 1 when one of them failed. Every part that needs a GPU and has been
measured nowhere else belongs here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
LIMIT_SECONDS = 420


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was run", file=sys.stderr)
        return 2
    gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as scratch:
        parts = [run_part(name, command) for name, command in commands(gpus, scratch).items()]
    report = {
        "device": torch.cuda.get_device_name(),
        "gpus": gpus,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "parts": parts,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(part["exit_code"] for part in parts))


def commands(gpus: int, scratch: str) -> dict[str, list[str]]:
    disttrain = [sys.executable, "-m", "disttrain"]
    run = [f"run.dir={scratch}/run", f"data.cache_dir={scratch}/cache", f"train.nproc={gpus}", "train.steps=100"]
    return {
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu"],
        "parity on nccl": [*disttrain, "verify", "--device", "cuda", "--nproc", str(min(gpus, 4))],
        "training in bf16, compiled": [
            *disttrain,
            "train",
            "configs/quickstart.toml",
            "device=cuda",
            *run,
            f"run.dir={scratch}/bf16",
            "parallel.param_dtype=bf16",
            "parallel.compile=true",
        ],
        "training under muon in bf16": [
            *disttrain,
            "train",
            "configs/muon.toml",
            "device=cuda",
            *run,
            f"run.dir={scratch}/muon",
            "parallel.param_dtype=bf16",
        ],
        "training under muonclip in bf16, compiled": [
            *disttrain,
            "train",
            "configs/muonclip.toml",
            "device=cuda",
            *run,
            f"run.dir={scratch}/muonclip",
            "parallel.param_dtype=bf16",
            "parallel.compile=true",
            "optim.clip.kind=adaptive",
            "optim.clip.warmup_steps=20",
        ],
        "training, watched": [
            *disttrain,
            "train",
            "configs/quickstart.toml",
            "device=cuda",
            *run,
            "profile.steps=[20,22]",
            "monitor.rank_metrics=true",
            "monitor.tensorboard.enabled=true",
        ],
        "its report": [*disttrain, "report", f"{scratch}/run"],
        **{
            f"training on {engine}, {strategy}": [
                *disttrain,
                "train",
                "configs/quickstart.toml",
                "device=cuda",
                *run,
                f"run.dir={scratch}/{engine}-{strategy}",
                f"engine={engine}",
                f"parallel.strategy={strategy}",
                "parallel.param_dtype=bf16",
            ]
            for engine, strategy in (("deepspeed", "zero2"), ("deepspeed", "fsdp"), ("accelerate", "fsdp"))
        },
        "what the doctor sees": [*disttrain, "doctor", "--nproc", str(gpus)],
    }


def run_part(name: str, command: list[str]) -> dict[str, Any]:
    print(f"== {name}: {' '.join(command)}", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        code, output = 124, f"still running after {LIMIT_SECONDS} s"
    print(output[-3000:], flush=True)
    return {"name": name, "command": " ".join(command[1:]), "exit_code": code, "last_lines": output.splitlines()[-20:]}


if __name__ == "__main__":
    sys.exit(main())
