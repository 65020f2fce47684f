"""Values as TOML spells them."""

from __future__ import annotations

import json
import re

from pydantic import BaseModel

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml_value(value: object) -> str:
    """JSON spells strings, numbers and booleans nearly as TOML does; what is None in a table is left out."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        items = (f"{_key(key)} = {toml_value(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(items) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float) and not value < float("inf"):
        return "inf" if value == value else "nan"
    # TOML has no escapes for halves of a character, which JSON makes of what is beyond 16 bits.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "-inf" if text == "-Infinity" else text


def setting_line(key: str, value: object, comment: str) -> str:
    """`key = value  # comment`, the comments below each other."""
    return f"{f'{key} = {toml_value(value)}':<44} # {one_line(comment)}"


def one_line(text: str) -> str:
    """A comment ends with its line: what would end it, or may not be in it, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else toml_value(name)
