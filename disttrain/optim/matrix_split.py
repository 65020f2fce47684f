"""Which parameters are matrices, and where one ends and the next begins in those that hold several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from disttrain.config.matrix_groups import MatrixGroup
from disttrain.errors import UserError
from disttrain.optim.matrix_plan import Box

_REMEDY = "give them to another group; match = ['role:matrices'] takes the hidden matrices, adamw suits the rest"


def matrix_problems(
    config: MatrixGroup, shapes: Mapping[str, Sequence[int]], embeddings: str | None = None
) -> Iterable[str]:
    """What keeps the group's algorithm from these parameters, in words; `embeddings` is a pattern over names."""
    where = f"optim.groups: group {config.name}"
    if others := [f"{name} ({_size(shape)})" for name, shape in shapes.items() if len(shape) != 2]:
        yield f"{where}: {config.algorithm} takes matrices only, not {', '.join(others[:8])}: {_REMEDY}"
    tables = [name for name, shape in shapes.items() if embeddings and len(shape) == 2 and re.search(embeddings, name)]
    if tables:
        yield (
            f"{where}: {config.algorithm} is for matrices that multiply every token, and {', '.join(tables)} is a "
            f"table of which a step sees some rows: {_REMEDY}"
        )
    for split in config.split:
        if not any(re.search(split.match, name) for name in shapes):
            yield f"{where}: split: {split.match!r} matches none of its parameters: {', '.join([*shapes][:8])}"


def blocks_of(name: str, shape: Sequence[int], config: MatrixGroup) -> list[Box]:
    """The matrices in a parameter, by the group's first split that matches its name; all of it where none does.

    Raises UserError for sizes that do not add up.
    """
    rows, columns = shape
    for split in config.split:
        if re.search(split.match, name):
            length = columns if split.dim else rows
            parts = _parts(split.sizes, length)
            if sum(parts) != length:
                raise UserError(
                    f"optim.groups: group {config.name}: split: {' + '.join(map(str, parts))} = {sum(parts)}, and "
                    f"{name} ({_size(shape)}) has {length} {'columns' if split.dim else 'rows'}: make the sizes add up"
                )
            starts = [sum(parts[:number]) for number in range(len(parts))]
            if split.dim:
                return [Box((0, start), (rows, size)) for start, size in zip(starts, parts, strict=True)]
            return [Box((start, 0), (size, columns)) for start, size in zip(starts, parts, strict=True)]
    return [Box((0, 0), (rows, columns))]


def _parts(sizes: int | tuple[int, ...], length: int) -> tuple[int, ...]:
    return (sizes,) * max(length // sizes, 1) if isinstance(sizes, int) else sizes


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"
