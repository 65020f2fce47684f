"""disttrain config: the resolved settings, and where each came from; and those of DeepSpeed in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from disttrain.config.from_deepspeed import from_deepspeed
from disttrain.config.load import flat_items, load_config
from disttrain.config.sources import read_override
from disttrain.config.toml_text import setting_line
from disttrain.errors import UserError


def config_command(
    config: Annotated[Path | None, typer.Argument(help="A TOML file or a run folder.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Values only, as JSON.")] = False,
    deepspeed: Annotated[
        Path | None, typer.Option("--from-deepspeed", help="A DeepSpeed JSON file to translate, in place of a config.")
    ] = None,
    world: Annotated[
        int | None, typer.Option(min=1, help="With --from-deepspeed: processes, where its batch needs them.")
    ] = None,
) -> None:
    """Show the resolved config as TOML, with the origin of each value."""
    if deepspeed is not None:
        _translate(deepspeed, world, as_json, [*([str(config)] if config else []), *(overrides or [])])
        return
    if config is None or world is not None:
        raise UserError(
            "name a TOML file or a run folder" if config is None else "--world is for --from-deepspeed; take it out"
        )
    loaded = load_config(config, overrides or [])
    if as_json:
        print(json.dumps(loaded.config.model_dump(mode="json"), indent=2))
        return
    tables: dict[str, list[str]] = {"": []}
    for key, value in flat_items(loaded.config).items():
        table, _, leaf = key.rpartition(".")
        origin = loaded.origins.get(key, "default")
        line = f"{f'# {leaf} is not set':<44} # {origin}" if value is None else setting_line(leaf, value, origin)
        # TOML wants a table's own settings together, before the tables in it.
        tables.setdefault(table, []).append(line)
    for table, lines in tables.items():
        print("\n".join([f"\n[{table}]", *lines] if table else lines))


def _translate(file: Path, world: int | None, as_json: bool, overrides: list[str]) -> None:
    if as_json:
        raise UserError(
            "--json shows resolved values: translate first, then `disttrain config --json` of the TOML file"
        )
    print(from_deepspeed(file, dict(map(read_override, overrides)), world), end="")
