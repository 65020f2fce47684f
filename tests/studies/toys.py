"""A base config, plans, and a trainer that writes what a run would leave, with losses by a formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from disttrain.config import RunConfig
from disttrain.studies.folder import ComparisonFolder
from disttrain.studies.plan import Plan
from disttrain.studies.request import Request, build_plan
from disttrain.studies.runner import Runner

BASE: dict[str, Any] = {
    "device": "cpu",
    "run": {"name": "toy"},
    "model": {"n_layers": 1, "d_model": 16, "n_heads": 2},
    "data": {"source": "synthetic", "tokenizer": "bytes"},
    "train": {"steps": 40, "global_batch_tokens": 256, "microbatch_size": 2, "sequence_length": 32, "seed": 7},
    "schedule": {"warmup_steps": 4},
}
BEST_RATE = {"adamw": 3e-4, "muon": 3e-4, "lion": 1e-4, "momentum": 0.1}
AHEAD = {"muon": -0.2, "lion": 0.001}
"""Of AdamW; Lion is within the noise of seeds."""


def base(device: str = "cpu", **sections: dict[str, Any]) -> RunConfig:
    merged = {key: BASE.get(key, {}) | more for key, more in sections.items()}
    return RunConfig.model_validate({**BASE, **merged, "device": device})


def request(optimizers: str | None = "adamw,muon", **said: Any) -> Request:
    plain: dict[str, Any] = dict.fromkeys(("tokens", "seeds", "target", "rate_factors", "decay_factors"))
    plain |= {"protocol": "small", "search": "rate-first", "batch_law": False}
    return Request(**{**plain, "rates": (), "decays": (), "overrides": (), "optimizers": optimizers, **said})


def plan(optimizers: str | None = "adamw,muon", **said: Any) -> Plan:
    return build_plan(request(optimizers, **said), base())


def toy_loss(config: RunConfig) -> float:
    """A bowl around the best rate and around a decay of a tenth, with a shift by seed that all optimizers share."""
    group = config.optim.resolved_groups[0]
    name = config.optim.preset
    off = math.log(group.lr / BEST_RATE[name]) ** 2 / 20
    decay = config.optim.weight_decay or 0.0
    own = 0.003 * math.sin(31 * config.train.seed + len(name))
    return 3 + off + abs(decay - 0.1) / 50 + 0.1 * math.sin(config.train.seed) + own + AHEAD.get(name, 0.0)


class ToyTrainer:
    """Writes a finished run; `fails` says which names end without one. `trained` has the names in their order."""

    def __init__(self, *fails: str) -> None:
        self.fails, self.trained = set(fails), list[str]()

    def __call__(self, config: RunConfig, log: Path) -> None:
        folder = config.run_dir
        folder.mkdir(parents=True, exist_ok=True)
        self.trained.append(config.run.name)
        if config.run.name in self.fails:
            log.write_text("step 1/20\nerror: the gradient of wte.weight is not finite\nbye\n")
            (folder / "status.json").write_text(json.dumps({"state": "failed", "step": 0}))
            return
        loss, steps = toy_loss(config), config.train.total_steps
        every = config.monitor.evaluate_every
        rows = []
        for step in sorted({*range(every, steps, every), steps}):
            ahead = 3 * (1 - step / steps)
            rows += [
                {"step": step, "forward_seconds": 1.0, "backward_seconds": 2.0, "optimizer_seconds": 0.5},
                {"step": step, "tokens": step * config.train.global_batch_tokens, "validation_loss": loss + ahead},
            ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = {"state": "completed", "step": steps, "wall_seconds": 2.0}
        (folder / "status.json").write_text(json.dumps(status))


def runner(plan: Plan, folder: Path, train: Any, said: list[str] | None = None, **more: Any) -> Runner:
    say = said.append if said is not None else lambda line: None
    return Runner(base(), plan, ComparisonFolder(folder), train, say, **more)


def own_update(matrix: Tensor, state: dict[str, Any]) -> Tensor:
    """An optimizer of a user, of one line."""
    return matrix.sign()
