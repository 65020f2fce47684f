"""A DeepSpeed config in our words: each key becomes one of ours, or is named with the reason why it does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from disttrain.config.deepspeed_file import read_object
from disttrain.config.deepspeed_keys import NO_COUNTERPART, why_not
from disttrain.config.deepspeed_optimizer import translate_optimizer
from disttrain.config.deepspeed_run import translate_run
from disttrain.config.run import RunConfig
from disttrain.config.toml_text import one_line, setting_line, toml_value
from disttrain.config.translation import Translation
from disttrain.errors import UserError


def from_deepspeed(file: Path, overrides: Mapping[str, Any], world: int | None = None) -> str:
    """The TOML text of a config that does what DeepSpeed's JSON `file` says, as far as it can.

    `overrides` are settings of ours by dotted key, which win: the file knows no sequence length and no length of the
    run. `world` is the number of processes, where the batch's arithmetic needs it. Raises UserError for a file that
    cannot be read, numbers that do not multiply, and values that our config refuses.
    """
    said = dict(_leaves(read_object(file, str(file))))
    translation = Translation(said, overrides, world)
    translate_run(translation)
    translate_optimizer(translation)
    _name_the_silent(translation)
    _name_the_rest(translation)
    if translation.problems:
        raise UserError(f"{file}: {problem}" for problem in translation.problems)
    for key, value in overrides.items():
        translation.settings[key] = (value, "override")
    _check(translation, file)
    return _as_toml(translation, file)


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; an empty object is a leaf too, so that it is named."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _name_the_silent(t: Translation) -> None:
    """Keys that a rule took without a word, mostly since what they switch off is off here too."""
    words = "\n".join([comment for _, comment in t.settings.values()] + [f"{key}:" for key, _, _ in t.notes])
    for key, value in t.taken.items():
        if key.startswith(("optimizer.", "scheduler.")) or ".".join(key.split(".")[-2:]) in words:
            continue  # rules of these two write down all that they take
        silent = value in (None, False, 0, "none")
        t.note(key, value, "as here where nothing is said" if silent else "other keys say it already")


def _name_the_rest(translation: Translation) -> None:
    """Whatever no rule has taken."""
    sections = {key.rpartition(".")[0] for key in translation.asked if "." in key} | {
        "optimizer.params",
        "scheduler.params",
    }
    for key in list(translation.rest):
        value = translation.rest.pop(key)
        if key in sections and value in (None, {}):
            translation.notes.append((key, value, "as here where nothing is said"))
            continue
        if key in sections:
            translation.problems.append(f"{key} = {value!r}: must be an object of settings, {{...}}")
            continue
        if reason := why_not(key):
            translation.notes.append((key, value, reason))
            continue
        near = difflib.get_close_matches(key, [*NO_COUNTERPART, *translation.asked], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        translation.notes.append((key, value, f"DeepSpeed 0.19 has no such key{hint}"))


def _as_toml(translation: Translation, file: Path) -> str:
    lines = [
        f"# What {one_line(file.name)} says, translated from DeepSpeed; what it does not say has disttrain's defaults."
    ]
    tables: dict[str, list[str]] = {}
    for key, (value, comment) in translation.settings.items():
        table, _, leaf = key.rpartition(".")
        tables.setdefault(table, []).append(setting_line(leaf, value, comment))
    for table in sorted(tables, key=_place):
        lines += [f"\n[{table}]" if table else "", *tables[table]]
    if translation.notes:
        lines.append("\n# DeepSpeed's keys that became none of these:")
        lines += [one_line(f"# {key} = {toml_value(value)}: {reason}") for key, value, reason in translation.notes]
    return "\n".join(lines) + "\n"


def _place(table: str) -> tuple[int, str]:
    """Sections in the order of the schema, a section before those in it."""
    section = table.split(".")[0]
    order = ["", *RunConfig.model_fields]
    return (order.index(section) if section in order else len(order), table)


def _check(translation: Translation, file: Path) -> None:
    """UserError where the values themselves are none that we take."""
    table: dict[str, Any] = {}
    for key, (value, _) in translation.settings.items():
        *way, last = key.split(".")
        place = table
        for part in way:
            place = place.setdefault(part, {})
        place[last] = value
    try:
        RunConfig.model_validate(table)
    except ValidationError as error:
        problems = ((".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors())
        raise UserError(
            f"{file}: its translation is refused: {place}: {message.removeprefix('Value error, ')} "
            f"(an override, as in {place or 'train.steps'}=..., takes the place of the file's value)"
            for place, message in problems
        ) from error
