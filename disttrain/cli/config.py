"""disttrain config: the resolved settings, and where each came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from disttrain.config.load import flat_items, load_config


def config_command(
    config: Annotated[Path, typer.Argument(help="A TOML file or a run folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Values only, as JSON.")] = False,
) -> None:
    """Show the resolved config as TOML, with the origin of each value."""
    loaded = load_config(config, overrides or [])
    if as_json:
        print(json.dumps(loaded.config.model_dump(mode="json"), indent=2))
        return
    tables: dict[str, list[str]] = {"": []}
    for key, value in flat_items(loaded.config).items():
        table, _, leaf = key.rpartition(".")
        setting = f"# {leaf} is not set" if value is None else f"{leaf} = {_toml(value)}"
        # TOML wants a table's own settings together, before the tables in it.
        tables.setdefault(table, []).append(f"{setting:<44} # {loaded.origins.get(key, 'default')}")
    for table, lines in tables.items():
        print("\n".join([f"\n[{table}]", *lines] if table else lines))


def _toml(value: object) -> str:
    """JSON spells strings, numbers and booleans as TOML does."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
