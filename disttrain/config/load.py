"""Loading a config: every error at once, each with its place, what is wrong and the nearest valid key."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from disttrain.config.algorithms import ALGORITHMS, BY_TAG
from disttrain.config.deepspeed import file_problems
from disttrain.config.run import RunConfig
from disttrain.config.sources import Values, read_values
from disttrain.errors import UserError

_OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "batch_size": "train.global_batch_tokens",
    "micro_batch_size": "train.microbatch_size",
    "max_steps": "train.steps",
    "max_seq_len": "train.sequence_length",
    "block_size": "train.sequence_length",
    "max_grad_norm": "optim.clip_norm",
    "warmup": "schedule.warmup_steps",
    "world_size": "train.nproc",
    "save_every": "checkpoint.every",
}
"""What other frameworks call our keys: spelling alone would not lead there."""


@dataclass(frozen=True)
class LoadedConfig:
    config: RunConfig
    origins: dict[str, str]
    """Dotted key to the place that set it; keys that are not here have their default."""


def load_config(
    path: Path,
    overrides: list[str],
    nproc: int | None = None,
    world: int | None = None,
    check_layout: bool = True,
) -> LoadedConfig:
    """Read, merge and check a config file or run folder.

    `nproc` is the command line's number of processes, `world` that of a launcher which has started already; with
    either (or `train.nproc`) the mesh and batch arithmetic is checked too, unless `check_layout` is false because
    nothing will run on that layout. Raises UserError with all problems at once.
    """
    values = read_values(path, overrides)
    if nproc is not None:
        values.set("train.nproc", nproc, "--nproc")
    table = values.table
    if path.is_dir():
        values.set("run.dir", str(path), "the run folder")
    if isinstance(run := table.get("run", {}), dict) and "name" not in run:
        values.set(
            "run.name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "run", "the config file's name"
        )
    config: RunConfig | None
    try:
        config, problems, broken = RunConfig.model_validate(table), [], frozenset[str]()
    except ValidationError as error:
        problems = [_in_words(detail, values) for detail in error.errors()]
        broken = frozenset(str(detail["loc"][0]) for detail in error.errors() if detail["loc"])
        config = _without_sections(table, broken)
    if config is not None and check_layout:
        for problem in layout_problems(config, world or config.train.nproc, broken):
            place = _place_of_first_key(problem, ("", "parallel."), values)
            problems.append(f"{place}: {problem}" if place else problem)
    if problems or config is None:
        raise UserError(problems)
    return LoadedConfig(config, values.origins)


def layout_problems(config: RunConfig, world: int | None, broken: frozenset[str] = frozenset()) -> list[str]:
    """What does not multiply or divide on `world` processes; sections named in `broken` are not judged."""
    if world is None or "parallel" in broken:
        return []
    # A run that has begun may be past its small batches: what it resumes with is known from its checkpoint.
    begun = any((config.run_dir / "checkpoints").glob("step-*"))
    try:
        config.dims(world) if "train" in broken or begun else config.check_batches(world)
    except ValueError as error:
        return [str(error)]
    return list(file_problems(config, world)) if config.engine == "deepspeed" and not broken else []


def flat_items(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of a section and the sections in it."""
    items: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            items |= flat_items(value, f"{prefix}{name}.")
        else:
            items[prefix + name] = value
    return items


def valid_keys(section: type[BaseModel] = RunConfig, prefix: str = "", optional: bool = False) -> list[str]:
    """Every dotted key of a config; with `optional`, of the sections too that are not there by default."""
    keys: list[str] = []
    for name, info in section.model_fields.items():
        kinds = (info.annotation, *(get_args(info.annotation) if optional else ()))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if len(inner) == 1:
            keys += valid_keys(inner[0], f"{prefix}{name}.", optional)
        else:
            keys.append(prefix + name)
    return keys


def _without_sections(table: dict[str, Any], broken: frozenset[str]) -> RunConfig | None:
    """The config with the broken sections at their defaults, so that the sound ones can be judged together."""
    rest = {key: value for key, value in table.items() if key not in broken}
    rest.setdefault("train", {"steps": 1})
    try:
        return RunConfig.model_validate(rest)
    except ValidationError:
        return None


def _in_words(detail: Any, values: Values) -> str:
    """One line for one of pydantic's errors."""
    key = ".".join(_as_written(detail["loc"], values.table))
    # A key in a list or union carries an index behind the name that the user wrote.
    place = next((values.origins[k] for k in _with_parents(key) if k in values.origins), None)
    place = place or _place_of_first_key(detail["msg"], (f"{key}." if key else "",), values)
    place = place or next((origin for k, origin in values.origins.items() if k.startswith(f"{key}.")), None)
    where = ": ".join(filter(None, (place, key)))
    if detail["type"] == "extra_forbidden":
        nearest = _nearest_in_group(detail["loc"]) or _nearest_key(key)
        return f"{where}: unknown key" + (f"; nearest valid key: {nearest}" if nearest else "")
    if detail["type"] == "missing":
        return f"{where}: missing; set it in the file or as an override"
    if detail["type"] == "union_tag_invalid":
        return f"{where}: {_unknown_kind(detail['ctx'])}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: a section, written as a [{key}] table (got {detail['input']!r})"
    message = (
        detail["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "must be")
        .replace("should have", "must have")
    )
    got = "" if isinstance(detail["input"], dict) else f" (got {detail['input']!r})"
    if detail["type"] == "string_type":
        got += "; put it in quotes"
    return f"{where}: {message}{got}".removeprefix(": ")


def _unknown_kind(context: Any) -> str:
    said, custom = context["tag"], "custom" in context["expected_tags"]
    known = [*ALGORITHMS] if custom else re.findall(r"\w+", context["expected_tags"])
    near = difflib.get_close_matches(said, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    more = ", a package.Class or a package.module:function" if custom else ""
    return f"{'algorithm' if custom else 'kind'} {said!r} is not known{hint} ({', '.join(known)}{more})"


def _as_written(location: tuple[int | str, ...], table: Any) -> list[str]:
    """The way to a value without the kinds that pydantic puts between (`groups.0.lion.lr`)."""
    parts: list[str] = []
    for place, part in enumerate(location):
        if isinstance(table, dict) and part not in table and place + 1 < len(location):
            continue
        parts.append(str(part))
        known = (isinstance(table, dict) and part in table) or (isinstance(table, list) and isinstance(part, int))
        table = table[part] if known else None
    return parts


def _place_of_first_key(message: str, prefixes: tuple[str, ...], values: Values) -> str | None:
    """Where the first key that `message` names was set, by the user or not at all."""
    keys = (prefix + word for word in re.findall(r"[a-z][a-z_.]*", message) for prefix in prefixes)
    return next((values.origins[key] for key in keys if key in values.origins), None)


def _with_parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _nearest_in_group(location: tuple[int | str, ...]) -> str | None:
    """What a group with this algorithm takes, where the unknown key is one of a group."""
    algorithm = next((BY_TAG[str(part)] for part in location[:-1] if part in BY_TAG), None)
    if algorithm is None or location[-2] not in BY_TAG:
        return None
    near = difflib.get_close_matches(str(location[-1]), algorithm.model_fields, n=1)
    return near[0] if near else f"one of {', '.join(algorithm.model_fields)}"


def _nearest_key(key: str) -> str | None:
    leaf = key.rsplit(".", 1)[-1]
    if leaf in _OTHER_NAMES:
        return _OTHER_NAMES[leaf]
    keys = valid_keys(optional=True)
    if "." not in key and (section := difflib.get_close_matches(key, RunConfig.model_fields, n=1)):
        return section[0]
    if same_leaf := [valid for valid in keys if valid.rsplit(".", 1)[-1] == leaf]:
        return same_leaf[0]
    if near := difflib.get_close_matches(key, keys, n=1, cutoff=0.6):
        return near[0]
    leaves = {valid.rsplit(".", 1)[-1]: valid for valid in keys}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    return leaves[near[0]] if near else None
