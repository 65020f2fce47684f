"""The loss times a constant, and the learning rate times it: `python benchmarks/loss_scale.py`, a minute on one core.

Trains a GPT of 0.1 million weights for 80 steps in fp32, one process, under AdamW (its default eps, 1e-8) and under
SGD, without clipping and weight decay. Multiplied by 2^10, 2 or 2^-10 are the loss, the loss with eps, or the rate; all
else is equal. Powers of two, so that multiplying rounds nothing. Writes results/loss_scale.{json,md}: the final loss,
how far the weights ended from those of the run in which nothing was multiplied, and for each factor how far the run
with the loss multiplied ended from the run with the rate multiplied.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.config.load import load_config
from disttrain.distributed.env import Ranks
from disttrain.engines import Engine
from disttrain.schedule import LrSchedule
from disttrain.testing import RankPool
from disttrain.train.build import build_training
from disttrain.train.preflight import open_config_data
from disttrain.train.step import train_step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
STEPS, SAMPLES, LENGTH, LAST = 80, 16, 64, 10
RATES = {"adamw": 2e-3, "sgd": 2.0**-11}
"""SGD's is low, so that 2^10 times as much still trains."""
EPS = 1e-8
FACTORS = {"2^10": 2.0**10, "2": 2.0, "2^-10": 2.0**-10}
KINDS = {"loss": ("adamw", "sgd"), "loss and eps": ("adamw",), "rate": ("adamw", "sgd")}
SETTINGS = [
    *("model.n_layers=2", "model.d_model=64", "data.source=synthetic", "data.tokenizer=bytes", "device=cpu"),
    *(f"train.sequence_length={LENGTH}", f"train.global_batch_tokens={SAMPLES * LENGTH}", f"train.steps={STEPS}"),
    *("train.microbatch_size=16", "parallel.strategy=ddp", "optim.weight_decay=0.0", "optim.clip.kind=none"),
    "resilience.anomaly.spikes=false",
]


class ScaledLoss:
    """An engine that multiplies every loss by `factor` before its backward."""

    def __init__(self, engine: Engine, factor: float) -> None:
        self.engine, self.factor = engine, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.factor)


# What the rank does.


def train_one(rank: int, world: int, optimizer: str, kind: str, factor: float) -> dict[str, Any]:
    """The loss of every step, without the factor, and the weights at the end."""
    settings = [*SETTINGS, f"optim.preset={optimizer}", f"optim.lr={RATES[optimizer]}"]
    if optimizer == "adamw":
        settings.append(f"optim.eps={EPS * factor if kind == 'loss and eps' else EPS}")
    config = load_config(ROOT / "configs" / "base.toml", settings, world=world).config
    data = open_config_data(config)
    config = config.with_vocab_size(data.tokenizer.vocab_size)  # type: ignore[union-attr]
    parts = build_training(config, data, Ranks(rank, world, rank, world), CPU)
    engine: Any = ScaledLoss(parts.engine, factor if kind.startswith("loss") else 1.0)
    schedule = LrSchedule("cosine", warmup_tokens=8, horizon_tokens=STEPS, final_ratio=0.1)
    losses = []
    for step in range(STEPS):
        batches = parts.loader.microbatches(step * SAMPLES, SAMPLES)
        tensors = [(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)) for batch in batches]
        rate = schedule.factor(step + 1) * (factor if kind == "rate" else 1.0)
        result = train_step(engine, tensors, lr_factor=rate, device=CPU)
        losses.append(result.loss_sum.item() / result.valid_tokens)
    return {"loss": losses, "weights": {name: p.detach().clone() for name, p in parts.gpt.named_parameters()}}


# What becomes of it.


def difference(weights: dict[str, Tensor], usual: dict[str, Tensor]) -> tuple[float, str]:
    """The largest max|a - b| / max|b| of a tensor, and the tensor's name."""
    ratios = {name: ((weights[name] - b).abs().max() / b.abs().max()).item() for name, b in usual.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    return ratios[worst], worst


def measured(pool: RankPool, optimizer: str) -> dict[str, Any]:
    """Rows by what was multiplied, and by factor how far loss and rate are apart."""
    ended: dict[str, dict[str, Any]] = {}
    cases = [("nothing", 1.0, "nothing")]
    for kind in (kind for kind, optimizers in KINDS.items() if optimizer in optimizers):
        cases += [(kind, factor, f"{kind} times {name}") for name, factor in FACTORS.items()]
    for kind, factor, case in cases:
        job = {"optimizer": optimizer, "kind": kind, "factor": factor}
        ended[case] = pool.run("benchmarks.loss_scale:train_one", 1, 300, **job)[0]
        print(f"{optimizer}, {case}: {final_loss(ended[case]['loss']):.4g}", flush=True)
    weights = {case: run["weights"] for case, run in ended.items()}
    rows = {}
    for case, run in ended.items():
        gap, tensor = difference(weights[case], weights["nothing"])
        rows[case] = {"loss": run["loss"], "difference": gap, "most_in": tensor}
    apart = {name: difference(weights[f"loss times {name}"], weights[f"rate times {name}"])[0] for name in FACTORS}
    return {"rows": rows, "loss_against_rate": apart}


def final_loss(losses: list[float]) -> float:
    return sum(losses[-LAST:]) / LAST


def markdown(results: dict[str, Any]) -> str:
    optimizers = results["optimizers"]
    lines = ["# Loss scale and learning rate", "", f"`{results['command']}`: {results['what']}", ""]
    heads = [f"{name}: final loss | weights differ by" for name in optimizers]
    lines += [f"| multiplied | {' | '.join(heads)} |", "|---" * (1 + 2 * len(heads)) + "|"]
    for case in optimizers["adamw"]["rows"]:
        cells = [measured["rows"].get(case) for measured in optimizers.values()]
        said = [f"{final_loss(c['loss']):.4f} | {c['difference']:.2g}" if c else " | " for c in cells]
        lines.append(f"| {case} | {' | '.join(said)} |")
    for name, measured in optimizers.items():
        apart = ", ".join(f"{gap:.2g} at {factor}" for factor, gap in measured["loss_against_rate"].items())
        lines += ["", f"{name}: the loss multiplied against the rate multiplied, weights differ by {apart}."]
    return "\n".join([*lines, ""])


def main() -> int:
    with RankPool(max_world=1) as pool:
        optimizers = {name: measured(pool, name) for name in RATES}
    results = {
        "command": "python benchmarks/loss_scale.py",
        "what": f"{STEPS} steps of {SAMPLES * LENGTH:,} tokens in fp32, one process; rates {RATES['adamw']:g} (AdamW, "
        f"eps {EPS:g}) and 2^-11 (SGD), no clipping, no weight decay. Final loss: mean of the last {LAST} steps, "
        "without the factor. Weights: the largest max\\|a - b\\| / max\\|b\\| of a tensor, b of the run with nothing "
        "multiplied",
        "optimizers": optimizers,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loss_scale.json").write_text(json.dumps(results) + "\n")
    (RESULTS / "loss_scale.md").write_text(markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
