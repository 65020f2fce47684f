"""From TOML files and dotted overrides to one nested table, with the place that every value came from."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disttrain.errors import UserError

_SECTION = re.compile(r"^\s*\[\s*([A-Za-z0-9_.\-]+)\s*\]")
_ENTRY = re.compile(r"^\s*\[\[\s*([A-Za-z0-9_.\-]+)\s*\]\]")
_KEY = re.compile(r"^\s*([A-Za-z0-9_.\-]+)\s*=")


@dataclass
class Values:
    """A nested table and, for each dotted key in it, where it was set (`configs/x.toml:12`, `override`)."""

    table: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set a dotted key; UserError when the way to it leads through a plain value."""
        *parents, leaf = key.split(".")
        table = self.table
        for depth, parent in enumerate(parents):
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"{origin}: {'.'.join(parents[: depth + 1])} is a value, so {key} cannot be set in it")
        table[leaf] = value
        self.origins[key] = origin


def read_values(path: Path, overrides: list[str]) -> Values:
    """The tables of `path` and the files it extends, deepest base first, then the `key.path=value` overrides."""
    values = Values()
    for file in reversed(_extends_chain(path)):
        table = _read_table(file)
        table.pop("extends", None)
        lines = _key_lines(file)
        for key, value in _leaves(table):
            values.set(key, value, f"{file}:{lines[key]}" if key in lines else str(file))
            # A list of tables is one value; its entries' keys are known by their index.
            within = {k: f"{file}:{line}" for k, line in lines.items() if k.startswith(f"{key}.")}
            values.origins = {k: v for k, v in values.origins.items() if not k.startswith(f"{key}.")} | within
    for override in overrides:
        values.set(*read_override(override), f"override {override!r}")
    return values


def read_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of `key.path=value`; UserError for anything else."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError(f"override {override!r}: write it as key.path=value, for example train.steps=100")
    return key.strip(), _override_value(text.strip())


def _extends_chain(path: Path) -> list[Path]:
    """`path` and, one after the other, the files that it extends."""
    chain = [_config_file(path)]
    while (base := _read_table(chain[-1]).get("extends")) is not None:
        if not isinstance(base, str):
            raise UserError(f"{chain[-1]}: extends = {base!r} must be the path of one TOML file")
        following = _config_file(chain[-1].parent / base)
        if following.resolve() in {file.resolve() for file in chain}:
            raise UserError(f"{chain[-1]}: extends = {base!r} leads back to a file that extends this one")
        chain.append(following)
    return chain


def _config_file(path: Path) -> Path:
    """The file behind `path`, which may be a run folder; UserError with the nearest files when there is none."""
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path}: a folder without config.json; name a .toml file or a run folder")
    near = sorted(str(file) for file in path.parent.glob("*.toml")) if path.parent.is_dir() else []
    raise UserError(f"{path}: no such file" + (f"; here are {', '.join(near)}" if near else ""))


def _read_table(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        table = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not valid {file.suffix[1:].upper()}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{file}: holds a {type(table).__name__}, not a table of settings")
    return _without_nulls(table) if file.suffix == ".json" else table


def _without_nulls(table: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a key that is null in config.json is a key that was not set."""
    return {k: _without_nulls(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _key_lines(file: Path) -> dict[str, int]:
    """Line numbers of the keys as people write them (tomllib keeps none); dotted and table forms, no inline tables."""
    section, lines, entries = "", dict[str, int](), dict[str, int]()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if entry := _ENTRY.match(line):
            name = entry.group(1)
            lines.setdefault(name, number)
            section = f"{name}.{entries.get(name, 0)}."
            entries[name] = entries.get(name, 0) + 1
            lines[section.rstrip(".")] = number
        elif header := _SECTION.match(line):
            section = header.group(1) + "."
        elif key := _KEY.match(line):
            lines[section + key.group(1)] = number
    return lines


def _override_value(text: str) -> Any:
    """The TOML value that `text` spells; anything that is none is taken as a string, so that quotes may be left out."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
