"""Optimizers as rows of a comparison: what stands in `[optim]` for each, and where its search begins.

A name of `optim.preset`, an element-wise class (`package.Class`) for everything, or a function of whole matrices
(`package.module:update`) for the hidden matrices, with AdamW for the rest.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import ValidationError

from disttrain.config import RunConfig
from disttrain.config.algorithms import ALGORITHMS
from disttrain.config.groups import Custom
from disttrain.config.matrix_groups import CustomMatrix
from disttrain.config.optim import OptimConfig, Preset
from disttrain.errors import UserError

PRESETS: tuple[str, ...] = get_args(Preset)
OF_ADAMW = {"rmsprop": 1.0, "soap": 1.0, "schedule_free_adamw": 2.0, "lion": 0.2}
"""Where a search begins as a multiple of AdamW's rate: steps as long as Adam's; may be longer (arXiv 2405.15682); 3 to
10 times shorter (arXiv 2302.06675). For others it is the ratio of the defaults."""
DECAY_WITHOUT_DEFAULT = 0.1
"""Where the search for a decay begins if the algorithm's own is 0, of which there are no multiples."""
KEPT = ("clip_norm", "clip", "exchange")
"""What all rows have of the config's `[optim]`; the rest is each optimizer's own."""


def check_optimizer(name: str) -> str | None:
    """What is wrong with a name, in words; None for one that can be tried."""
    kind = CustomMatrix if ":" in name else Custom if "." in name else None
    if kind is None:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = f"{', '.join(PRESETS)}, package.Class, package.module:update"
        return None if name in PRESETS else f"optimizer {name!r} is not known{hint} ({known})"
    try:
        kind.model_validate({"name": "user", "match": (".*",), "algorithm": name})
    except ValidationError:
        return f"optimizer {name!r}: write it as package.Class or package.module:update"
    return None


def optim_section(name: str, rate: float, decay: float, base: RunConfig) -> dict[str, Any]:
    """`[optim]` of a row, as JSON: `rate` for all its groups, `decay` for those that decay, clipping as in `base`."""
    kept = base.optim.model_dump(mode="json", include=set(KEPT))
    section: dict[str, Any] = {**kept, "lr": rate, "weight_decay": decay}
    if name in PRESETS:
        return section | {"preset": name}
    # As presets have it: embeddings, norms and biases do not decay. Rules of a config must match something.
    rest = "adamw" if ":" in name else name
    groups = [{"name": "matrices", "match": ["role:matrices"], "algorithm": name}]
    if not base.model.tie_embeddings:
        groups.append({"name": "decay", "match": ["role:head"], "algorithm": rest})
    spared = {"name": "no_decay", "match": [".*"], "algorithm": rest, "weight_decay": 0.0}
    return section | {"groups": [*groups, spared]}


def centre(name: str, base: OptimConfig) -> tuple[float, float]:
    """Rate and decay in the middle of a search: the defaults, times what the config's rate is of that of its preset.

    A model that wants ten times AdamW's default, because it is small, say, wants about ten times those of others too.
    """
    rate, decay = _defaults(name)
    if name in PRESETS and base.lr is not None and not base.groups:
        rate = base.lr / _of_adamw(base.preset) * _of_adamw(name)
    return rate, decay or DECAY_WITHOUT_DEFAULT


def _of_adamw(name: str) -> float:
    return OF_ADAMW.get(name) or _defaults(name)[0] / _defaults("adamw")[0]


def _defaults(name: str) -> tuple[float, float]:
    """Rate and decay of an algorithm that nobody has tuned."""
    algorithm = ALGORITHMS[{"muonclip": "muon"}.get(name, name)] if name in PRESETS else Custom
    return float(algorithm.model_fields["lr"].default), float(algorithm.model_fields["weight_decay"].default)


def multiples(middle: float, factors: tuple[float, ...]) -> tuple[float, ...]:
    """Rounded to the digits that people write, so that names of folders stay short."""
    return tuple(float(f"{middle * factor:.4g}") for factor in factors)


def grid_of(text: str, option: str) -> tuple[str, tuple[float, ...]]:
    """`lion=1e-4,3e-4` as a name and its values; UserError in words."""
    name, equals, values = text.partition("=")
    if not equals:
        raise UserError(f"{option} {text!r}: write it as OPTIMIZER=VALUE,VALUE,...; for example lion=1e-4,3e-4,1e-3")
    return name.strip(), numbers(values, option)


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Rising numbers of a list with commas; UserError in words."""
    try:
        found = tuple(float(part) for part in re.split(r"\s*,\s*", text.strip()))
    except ValueError:
        raise UserError(f"{option} {text!r}: must be numbers with commas between them") from None
    if list(found) != sorted(set(found)) or not all(0 <= value < float("inf") for value in found):
        raise UserError(f"{option} {text!r}: must rise and not be below 0, each number once")
    return found
