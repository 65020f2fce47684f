"""Values as TOML spells them."""

from __future__ import annotations

import json

from pydantic import BaseModel


def toml_value(value: object) -> str:
    """JSON spells strings, numbers and booleans as TOML does; what is None in a table is left out."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items() if item is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value)


def setting_line(key: str, value: object, comment: str) -> str:
    """`key = value  # comment`, the comments below each other."""
    return f"{f'{key} = {toml_value(value)}':<44} # {comment}"
