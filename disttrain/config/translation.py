"""The notebook of a translation from another framework's settings to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", list: "a list"}


class Translation:
    """`rest` are the other's settings by dotted key that nobody has taken yet; `overrides` are the user's, in ours."""

    def __init__(self, rest: Mapping[str, Any], overrides: Mapping[str, Any], world: int | None) -> None:
        self.rest, self.overrides, self.world = dict(rest), overrides, world
        self.settings: dict[str, tuple[Any, str]] = {}
        """Ours by dotted key, with the comment that says where a value is from and what is different."""
        self.notes: list[tuple[str, Any, str]] = []
        """Theirs with their values that became none of ours, and why."""
        self.problems: list[str] = []
        self.left_open: set[str] = set()
        """Theirs that are `auto`."""
        self.taken: dict[str, Any] = {}
        """Theirs that a rule has dealt with, whether it wrote something or not."""
        self.asked: list[str] = []
        """Theirs that rules have looked for, given or not."""

    def take(self, key: str, kind: type = object, ours: str = "") -> Any:
        """The other's value, which is then dealt with; None where it is not given, `auto`, or not of its `kind`.

        `ours` is what an `auto` leaves at its default.
        """
        self.asked.append(key)
        if key not in self.rest:
            return None
        value = self.taken[key] = self.rest.pop(key)
        if value == "auto":
            self.left_open.add(key)
            where = f"{ours} has its default" if ours else "nothing is set"
            self.notes.append((key, value, f"filled in by the script that read the file; here {where}"))
            return None
        if value is None or _is_a(value, kind):
            return value
        self.problems.append(f"{key} = {value!r}: must be {_KINDS[kind]}")
        return None

    def set(self, key: str, value: Any, comment: str) -> None:
        self.settings[key] = (value, comment)

    def note(self, key: str, value: Any, reason: str) -> None:
        self.notes.append((key, value, reason))

    def section(self, prefix: str) -> list[str]:
        """Dotted keys of a section that nobody has taken yet."""
        return [key for key in self.rest if key.startswith(f"{prefix}.")]


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)
