"""Templates in the package become files: plain text with `@{name}` where a value goes. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files

_PLACE = re.compile(r"@\{(\w+)\}")


def render(template: str, values: Mapping[str, str]) -> str:
    """The text of `templates/TEMPLATE` with its places filled.

    A line that holds nothing but a place takes as many lines as its value has, with its own indentation, and goes
    away where the value is empty. Raises KeyError for a place that has no value.
    """
    text = (files("disttrain.launching") / "templates" / template).read_text(encoding="utf-8")
    return fill(text, values)


def fill(text: str, values: Mapping[str, str]) -> str:
    """`render` for a template that is at hand."""
    return "".join(_filled(line, values) for line in text.splitlines(keepends=True))


def _filled(line: str, values: Mapping[str, str]) -> str:
    stripped = line.strip()
    if alone := _PLACE.fullmatch(stripped):
        value = values[alone[1]]
        indent = line[: len(line) - len(line.lstrip())]
        return "".join(f"{indent}{one}\n" if one else "\n" for one in value.splitlines())
    return _PLACE.sub(lambda place: values[place[1]], line)
