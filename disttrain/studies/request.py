"""What a user asked for, checked: every problem at once, each in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from disttrain.config import RunConfig
from disttrain.errors import UserError
from disttrain.studies.cells import base_problems, ground_of, rules_that_hold, run_config
from disttrain.studies.optimizers import centre, check_optimizer, grid_of, multiples, numbers
from disttrain.studies.plan import BATCH_MULTIPLES, PROTOCOLS, Cell, Plan, Protocol, Row, Search

FIXED_BY_TRACK = ("model.", "data.", "train.global_batch_tokens", "train.sequence_length")
"""The public optimizer track fixes data, model and batch; a config that has them is compared as it stands."""
Grid = tuple[float, ...]


@dataclass(frozen=True)
class Request:
    """The command line, before it is checked; None for what was not said."""

    protocol: str
    search: str
    optimizers: str | None
    tokens: int | None
    seeds: int | None
    target: float | None
    batch_law: bool
    rate_factors: str | None
    decay_factors: str | None
    rates: tuple[str, ...]
    decays: tuple[str, ...]
    overrides: tuple[str, ...]


def build_plan(request: Request, base: RunConfig) -> Plan:
    """Raises UserError with every problem."""
    if request.protocol not in PROTOCOLS:
        raise UserError(f"--protocol {request.protocol}: must be one of {', '.join(PROTOCOLS)}")
    if request.search not in ("rate-first", "grid"):
        raise UserError(f"--search {request.search}: must be rate-first or grid")
    protocol: Protocol = request.protocol
    search: Search = request.search  # type: ignore[assignment]
    names = _names(request, base)
    tokens = request.tokens or base.train.tokens or base.train.batches().tokens_after(base.train.total_steps)
    seeds = request.seeds if request.seeds is not None else PROTOCOLS[protocol].seeds
    multiples_ = set(BATCH_MULTIPLES) if request.batch_law else set()
    problems = [*_name_problems(names), *_claim_problems(protocol, request, seeds), *_budget_problems(request, base)]
    problems += base_problems(base, tokens, multiples_)
    if problems:
        raise UserError(problems)
    rows = _rows(request, base, names, protocol)
    plan = Plan(
        protocol=protocol,
        search=search,
        rows=rows,
        tokens=tokens,
        steps=-(-tokens // base.train.global_batch_tokens),
        search_seed=base.train.seed,
        seeds=tuple(base.train.seed + 1 + index for index in range(seeds)),
        target=request.target,
        ground=ground_of(base, protocol, tokens, rows[0]),
    )
    for row in plan.rows:  # the settings of every row go together
        run_config(base, protocol, tokens, row, Cell(row.label, row.rates[0], row.decays[0], 0), "")
    return plan


def _names(request: Request, base: RunConfig) -> list[str]:
    if request.optimizers is None:
        if not request.batch_law:
            raise UserError("--optimizers: missing; name some with commas between them, the baseline first")
        return [base.optim.preset]
    return [name.strip() for name in request.optimizers.split(",") if name.strip()]


def _name_problems(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    problems = [f"--optimizers: {problem}" for name in dict.fromkeys(names) if (problem := check_optimizer(name))]
    if not names:
        problems.append("--optimizers: names nothing; for example adamw,muon")
    return problems + [f"--optimizers: {name} is named twice" for name in twice]


def _claim_problems(protocol: Protocol, request: Request, seeds: int) -> list[str]:
    problems = []
    if seeds < 1:
        problems.append(f"--seeds {seeds}: there must be one at least")
    elif seeds < 2 and PROTOCOLS[protocol].claims:
        problems.append(
            "--seeds 1: one seed has no spread, so that nothing could be said to be better; set --seeds 3 or more "
            f"(protocol {protocol} gives verdicts), or --protocol smoke, which claims nothing"
        )
    if (request.target is None) == (protocol == "track3"):
        problems.append(
            "--protocol track3 counts steps to a validation loss: set --target (that of the public track is 3.28)"
            if protocol == "track3"
            else f"--target is for --protocol track3; {protocol} compares losses at the end"
        )
    if request.target is not None and not 0 < request.target < math.inf:
        problems.append(f"--target {request.target:g}: must be a loss above 0")
    fixed = [override for override in request.overrides if override.strip().startswith(FIXED_BY_TRACK)]
    if protocol == "track3" and fixed:
        problems.append(f"{', '.join(fixed)}: track3 fixes data, model and batch; set them in the config, for all")
    return problems


def _budget_problems(request: Request, base: RunConfig) -> list[str]:
    said = [text for text in request.overrides if text.split("=")[0].strip() in ("train.tokens", "train.steps")]
    if request.tokens is None or not said:
        return []
    own = base.train.tokens or base.train.batches().tokens_after(base.train.total_steps)
    if own == request.tokens:
        return []
    return [
        f"budgets differ: --tokens {request.tokens:,}, but {said[-1]} makes {own:,}; all runs have one budget: leave "
        "one of the two out"
    ]


def _rows(request: Request, base: RunConfig, names: list[str], protocol: Protocol) -> tuple[Row, ...]:
    rates = _own_grids(request.rates, "--rates", names)
    decays = _own_grids(request.decays, "--decays", names)
    rules = PROTOCOLS[protocol]
    rate_factors = _factors(request.rate_factors, "--rate-factors", rules.rate_factors)
    decay_factors = _factors(request.decay_factors, "--decay-factors", rules.decay_factors)
    searched = []
    for name in names:
        rate, decay = centre(name, base.optim)
        row_rates = rates.get(name) or multiples(rate, rate_factors)
        searched.append(Row(name, name, row_rates, decays.get(name) or multiples(decay, decay_factors)))
    if problems := _grid_problems(searched):
        raise UserError(problems)
    rows = list(searched)
    if request.batch_law:
        rows += [
            Row(f"{row.label} {multiple}B {rule}", row.optimizer, row.rates, row.decays, multiple, rule)
            for row in searched
            for multiple in BATCH_MULTIPLES
            for rule in rules_that_hold(base, row.optimizer, multiple)
        ]
    elif len(rows) < 2:
        raise UserError(f"--optimizers {names[0]}: a comparison needs two at least, the baseline first")
    return tuple(rows)


def _factors(said: str | None, option: str, usual: Grid) -> Grid:
    return usual if said is None else numbers(said, option)


def _own_grids(texts: tuple[str, ...], option: str, names: list[str]) -> dict[str, Grid]:
    said = [grid_of(text, option) for text in texts]
    grids = dict(said)
    if len(grids) < len(said):
        raise UserError(f"{option}: one optimizer is named twice; give all its values at once, with commas")
    if strangers := [name for name in grids if name not in names]:
        raise UserError(f"{option}: {', '.join(strangers)} is not among --optimizers {','.join(names)}")
    return grids


def _grid_problems(rows: list[Row]) -> list[str]:
    """Grids of one, rates of 0, and grids of unequal length."""
    problems = []
    grids: tuple[tuple[str, Mapping[str, Grid]], ...] = (
        ("rates", {row.label: row.rates for row in rows}),
        ("weight decays", {row.label: row.decays for row in rows}),
    )
    for what, found in grids:
        for name, grid in found.items():
            if len(grid) < 2:
                problems.append(
                    f"{name}: a grid of one {what[:-1]} is no search, and an untuned row no comparison; give more"
                )
            if what == "rates" and grid[0] == 0:
                problems.append(f"{name}: a rate of 0 trains nothing; leave it out")
        if len({len(grid) for grid in found.values()}) > 1:
            counts = ", ".join(f"{name} {len(grid)}" for name, grid in found.items())
            problems.append(f"{what} to try: {counts}; every optimizer gets equally many trials: make them equal")
    return problems
