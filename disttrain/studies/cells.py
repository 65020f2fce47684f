"""The config of every run of a comparison: the user's own, with what makes runs alike and what makes them differ."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from disttrain.config import RunConfig
from disttrain.config.load import flat_items
from disttrain.config.optim import OptimConfig
from disttrain.errors import UserError
from disttrain.schedule.batch_law import scale_by_batch
from disttrain.studies.optimizers import centre, optim_section
from disttrain.studies.plan import BATCH_RULES, PROTOCOLS, Cell, Plan, Protocol, Row, Rule

NOT_OF_THE_GROUND = (
    "device",
    "run.",
    "optim.",
    "train.nproc",
    "train.seed",
    "train.tokens",
    "data.cache_dir",
    "monitor.wandb.",
)
"""What may differ between runs, or between the machines that share a folder."""
LEAST_STEPS = 8


def cell_config(base: RunConfig, plan: Plan, cell: Cell, folder: str) -> RunConfig:
    """UserError when the settings of this run do not go together."""
    row = next(row for row in plan.rows if row.label == cell.row)
    return run_config(base, plan.protocol, plan.tokens, row, cell, folder)


def run_config(base: RunConfig, protocol: Protocol, tokens: int, row: Row, cell: Cell, folder: str) -> RunConfig:
    """`base` for one cell, with its run folder; the data and its order, the model and the budget are those of all."""
    table = base.model_dump(mode="json")
    batch = base.train.global_batch_tokens * row.multiple
    steps = -(-tokens // batch)
    table["run"] = {"name": cell.name, "dir": folder, "resume": "auto"}
    table["train"] |= {"steps": None, "tokens": tokens, "seed": cell.seed, "global_batch_tokens": batch}
    table["optim"] = optim_section(row.optimizer, cell.rate, cell.decay, base)
    table["schedule"] |= _schedule(base, tokens, row)
    table["checkpoint"]["keep_last"] = 1
    every = max(1, steps // PROTOCOLS[protocol].evaluations)
    table["monitor"] |= {"evaluate_every": every, "sample_tokens": 0, "bigram_baseline": False, "noise_scale_every": 0}
    table["monitor"]["log_every"] = min(base.monitor.log_every, every)
    # A step that one run leaves out and another does not would be a difference of the data.
    table["resilience"]["anomaly"]["spikes"] = False
    try:
        return RunConfig.model_validate(_without_nulls(table))
    except ValidationError as error:
        raise UserError([f"{cell.row}: {_words(detail)}" for detail in error.errors()]) from None


def _schedule(base: RunConfig, tokens: int, row: Row) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if row.optimizer == "schedule_free_adamw":
        own["shape"] = "constant"  # it averages in place of a decay
    if row.rule is not None:
        # Warm-up and cooldown in steps would be as many times longer as the batch is larger.
        train = base.train.model_copy(update={"steps": None, "tokens": tokens})
        law = base.model_copy(update={"train": train}).lr_schedules(train.batches())[0]
        own |= {"warmup_steps": None, "warmup_tokens": law.warmup_tokens, "batch_lr_rule": row.rule}
        own |= {"cooldown_steps": None, "cooldown_tokens": law.cooldown_tokens}
        own["matrix_lr_rule"] = row.rule.removesuffix("_full")
        own["base_batch_tokens"] = base.train.global_batch_tokens
    return own


def _without_nulls(table: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_nulls(v) if isinstance(v, dict) else v for key, v in table.items() if v is not None}


def _words(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    return f"{place}: {detail['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def rules_that_hold(base: RunConfig, name: str, multiple: int) -> list[Rule]:
    """What a batch so many times as large can go by: sqrt_full not where it would make a beta negative."""
    groups = OptimConfig.model_validate(optim_section(name, *centre(name, base.optim), base)).resolved_groups
    found: list[Rule] = []
    for rule in BATCH_RULES:
        with suppress(ValueError):
            for group in groups:
                scale_by_batch(rule, multiple, getattr(group, "betas", None))
            found.append(rule)
    return found


def base_problems(base: RunConfig, tokens: int, multiples: set[int]) -> list[str]:
    """What keeps runs of this config from being compared."""
    schedule, problems = base.schedule, []
    if schedule.horizon_steps is not None or schedule.horizon_tokens is not None:
        problems.append("schedule.horizon_*: every run has a whole schedule over its budget; leave it out")
    if base.train.batch_auto is not None:
        problems.append("train.batch_auto: each run would find batches of its own; set one batch, or a batch_ramp")
    if schedule.base_batch_tokens is not None:
        problems.append("schedule.base_batch_tokens: the rates are searched at the batch itself; leave it out")
    if multiples and base.train.batch_ramp is not None:
        problems.append("train.batch_ramp: --batch-law compares whole batches; leave the ramp out")
    for multiple in sorted({1, *multiples}):
        batch = base.train.global_batch_tokens * multiple
        if tokens < LEAST_STEPS * batch:
            times = "" if multiple == 1 else f" ({multiple} times train.global_batch_tokens)"
            problems.append(
                f"--tokens {tokens}: a batch of {batch:,} tokens{times} gives {tokens / batch:.1f} steps; at least "
                f"{LEAST_STEPS} are needed, that is {LEAST_STEPS * batch:,} tokens"
            )
    return problems + _unequal_budgets(base, tokens, multiples)


def _unequal_budgets(base: RunConfig, tokens: int, multiples: set[int]) -> list[str]:
    """Runs end with a whole step, so that a larger batch may train beyond the budget."""
    batch = base.train.global_batch_tokens
    largest = batch * max(multiples, default=1)
    trained = -(-tokens // batch) * batch
    if not trained % largest:
        return []
    whole = -(-trained // largest) * largest
    return [
        f"budgets differ: --tokens {tokens:,} is {trained / largest:.2f} steps of {largest:,} tokens, which train "
        f"to the end of the last; set --tokens {whole:,}"
    ]


def ground_of(base: RunConfig, protocol: Protocol, tokens: int, row: Row) -> dict[str, Any]:
    """What all cells have in common, as dotted keys, with what all rows have of `[optim]`."""
    rate, decay = centre(row.optimizer, base.optim)
    config = run_config(base, protocol, tokens, row, Cell(row.label, rate, decay, 0), "")
    items = {key: value for key, value in _flat(config).items() if not key.startswith(NOT_OF_THE_GROUND)}
    return items | {"optim.clip_norm": base.optim.clip_norm, "optim.clip": str(base.optim.clip or "by the norm of all")}


def _flat(config: RunConfig) -> dict[str, Any]:
    """As JSON gives them back."""
    plain = flat_items(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
