"""Reading a user's ds_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from disttrain.errors import UserError


def read_object(file: Path, where: str) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError, which begins with `where`, for what DeepSpeed or we cannot take."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
        json.dumps(table, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}:{error.lineno}: not valid JSON: {error.msg}; comments and trailing commas, which DeepSpeed reads "
            "(Hjson), must be taken out"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: its brackets are nested too deep for settings") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{where}: {half!r} is half of a character, which nobody can print") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror or error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{where}: holds a {type(table).__name__}, not an object of settings")
    return table


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twins := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{', '.join(twins)} is given twice; leave one of them")
    return dict(pairs)
