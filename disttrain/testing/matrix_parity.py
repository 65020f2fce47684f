"""Algorithms that need whole matrices, on every layout and way of exchange, against naive references; in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ValidationError

from disttrain.config import OptimConfig
from disttrain.config.groups import Custom
from disttrain.config.matrix_groups import CustomMatrix
from disttrain.errors import UserError
from disttrain.optim.adapter import self_test
from disttrain.optim.matrix_updates import matrix_update
from disttrain.testing.optimizer_parity import (
    CLIPS,
    STRATEGIES,
    SYNTHETIC_TOLERANCE,
    TRAINING_TOLERANCE,
    Spoil,
    synthetic_error,
    training_error,
)
from disttrain.testing.parity import ParityRow, place
from disttrain.testing.pool import RankPool

WORLDS = (2, 3, 4, 8)
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "ddp": (STRATEGIES["ddp"], "spread"),
    "ddp replicate": (STRATEGIES["ddp"], "replicate"),
    "zero1": (STRATEGIES["zero1"], "auto"),
    "zero2": (STRATEGIES["zero2"], "auto"),
    "fsdp": (STRATEGIES["fsdp"], "auto"),
    "hsdp": (STRATEGIES["hsdp"], "replicate"),
    "hsdp spread": (STRATEGIES["hsdp"], "spread"),
}
"""Settings of a strategy, and who computes where several processes hold the same shard."""
Splits = tuple[list[dict[str, Any]], list[dict[str, Any]]]
_TOY_SPLITS: Splits = ([{"match": "tall", "sizes": [5, 4, 2]}], [{"match": "wide", "sizes": 2, "dim": 1}])
_GPT_SPLITS: Splits = ([{"match": "w[qk]", "sizes": 2}], [{"match": "up", "sizes": [20, 7]}])
"""Of either group: in blocks of rows, of columns, by heads."""

_MUON = {"algorithm": "muon", "lr": 0.02, "compute_dtype": "parameter"}
CASES: dict[str, dict[str, Any]] = {
    "muon": _MUON,
    "muon (keller5, heavy ball)": {
        **_MUON,
        "coefficients": "keller5",
        "nesterov": False,
        "lr_scale": "original",
    },
    "muon (split)": {**_MUON, "split": True, "lr_scale": "spectral"},
    "normuon": {**_MUON, "algorithm": "normuon"},
    "soap": {"algorithm": "soap", "lr": 0.01, "every": 2},
    # A root of a nearly singular matrix magnifies rounding by ridge^(-1/4).
    "shampoo": {"algorithm": "shampoo", "lr": 0.01, "every": 2, "ridge": 1e-4},
}
ALGORITHMS = tuple(dict.fromkeys(case["algorithm"] for case in CASES.values()))


def matrix_cases(algorithm: str | None = None) -> dict[str, dict[str, Any]]:
    """All cases, those of one algorithm, or one for a function of the user's."""
    if algorithm is None:
        return CASES
    known = {name: case for name, case in CASES.items() if case["algorithm"] == algorithm}
    return known or {algorithm: {"algorithm": algorithm, "lr": 0.02}}


def check_importable(algorithm: str) -> None:
    """Try a function or class of the user's in this process, before any rank starts; UserError if it cannot work."""
    common: dict[str, Any] = {"name": "user", "match": (".*",), "algorithm": algorithm}
    try:
        if ":" in algorithm:
            matrix_update(CustomMatrix.model_validate(common), torch.float64, torch.device("cpu"))
        elif "." in algorithm:
            self_test(Custom.model_validate(common))
    except ValidationError as error:
        raise UserError(f"{algorithm}: is no name of the form package.Class or package.module:update") from error


def matrix_table(pool: RankPool, worlds: tuple[int, ...] = WORLDS, algorithm: str | None = None) -> Iterator[ParityRow]:
    """A row for each case on drawn gradients and in training, on every layout that the world allows."""
    for world in worlds:
        for layout in layouts(world):
            job = {"device": pool.device, "layout": layout, "algorithm": algorithm}
            drawn = pool.run("disttrain.testing.matrix_parity:synthetic_job", world, 120, **job)[0]
            for name, error in drawn.items():
                yield ParityRow(layout, world, f"{name}, drawn gradients", "parameters", error, SYNTHETIC_TOLERANCE)
            trained = pool.run("disttrain.testing.matrix_parity:training_job", world, 240, **job)[0]
            for name, error in trained.items():
                yield ParityRow(layout, world, f"{name}, training", "parameters", error, TRAINING_TOLERANCE)


def layouts(world: int) -> list[str]:
    """Two copies need an even number of processes."""
    return [name for name, (settings, _) in LAYOUTS.items() if world % settings.get("dp_replicate", 1) == 0]


def matrix_optim(
    case: dict[str, Any], replicas: str, first: list[str], second: list[str], splits: Splits, **exchange: Any
) -> OptimConfig:
    """Two groups of one algorithm that differ in rate and decay, for names that match; adamw for the rest."""
    splits = splits if case.get("split") else ([], [])
    own = {**case, "name": "first", "match": first, "clip": CLIPS["norm of all"], "split": splits[0]}
    other = {**own, "name": "second", "match": second, "split": splits[1], "lr": case["lr"] / 2, "weight_decay": 0.03}
    rest = {"name": "rest", "match": [".*"], "algorithm": "adamw", "lr": 0.01, "eps": 1e-6, "clip": own["clip"]}
    settings = {"groups": [own, other, rest], "exchange": {"replicas": replicas, **exchange}}
    return OptimConfig.model_validate(settings)


# What ranks do.


def synthetic_job(
    rank: int,
    world: int,
    device: str,
    layout: str,
    algorithm: str | None = None,
    spoil: Spoil = lambda optimizer: None,
) -> dict[str, float]:
    """The largest error of every case after steps with the same drawn gradients."""
    settings, replicas = LAYOUTS[layout]
    return {
        name: synthetic_error(world, place(device, rank), settings, synthetic_optim(case, replicas), spoil)
        for name, case in matrix_cases(algorithm).items()
    }


def synthetic_optim(case: dict[str, Any], replicas: str, **exchange: Any) -> OptimConfig:
    """For `optimizer_parity.Toys`."""
    return matrix_optim(case, replicas, ["square|tall"], ["wide|one_row|zero"], _TOY_SPLITS, **exchange)


def training_job(rank: int, world: int, device: str, layout: str, algorithm: str | None = None) -> dict[str, float]:
    """The largest error of a GPT's weights after training with every case."""
    settings, replicas = LAYOUTS[layout]
    errors = {}
    for name, case in matrix_cases(algorithm).items():
        names = [r"attention\.w[qkvo]\.weight"], ["role:matrices"]
        optim = matrix_optim(case, replicas, *names, _GPT_SPLITS, bucket_bytes=256)
        errors[name] = training_error(rank, world, place(device, rank), settings, optim)
    return errors
