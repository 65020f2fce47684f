"""Reading what a stranger may have made: plain files, JSON that has one meaning, and values of the kind that is meant.

This file imports no torch.
"""

from __future__ import annotations

import errno
import json
import math
import re
import stat
from collections import Counter
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LONGEST_NAME = 4096


def plain_size(path: Path) -> int:
    """The bytes of a plain file. Raises OSError for anything else, without opening it: a FIFO would hang."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of an unknown kind")
        raise OSError(errno.EINVAL, f"it is {kind}, not a plain file", str(path))
    return status.st_size


def strict_json(content: bytes) -> Any:
    """UTF-8 JSON without NaN, infinities and repeated keys, which readers understand in different ways.

    Raises ValueError.
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {shortened(twice)} appears twice")
    return table


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{shortened(number)} is beyond the largest number")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def text(value: Any) -> str:
    """A name that a terminal prints without obeying it; ValueError otherwise."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > _LONGEST_NAME:
        raise ValueError(f"{shortened(value)} is not printable text of at most {_LONGEST_NAME:,} characters")
    return value


def matching(pattern: re.Pattern[str], value: Any, kind: str) -> str:
    """Text that `pattern` matches from end to end, which is what `kind` means; ValueError otherwise."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{shortened(value)} is not {kind}")
    return value


def table(value: Any) -> dict[str, Any]:
    """A JSON object; ValueError otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"{shortened(value)} is not a table")
    return value


def natural(value: Any) -> int:
    """A count that fits 63 bits; ValueError otherwise, so for true and 1.0."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{shortened(value)} is not a count below 2**63")
    return value


def naturals(values: Any) -> tuple[int, ...]:
    """A list of counts; ValueError otherwise."""
    if type(values) is not list:
        raise ValueError(f"{shortened(values)} is not a list of counts")
    for value in values:
        natural(value)
    return tuple(values)
