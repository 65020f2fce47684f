"""Who owns which parameter, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from re import sub
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.config.clipping import AGC, AdaptiveClip, Clip, ClipNorm, ClipValue, ZClip
from disttrain.optim.optimizer_set import OptimizerSet
from disttrain.optim.sharding import flat


@dataclass(frozen=True)
class Ownership:
    """One parameter. `state_bytes` are those of its whole optimizer state, over the ranks of one copy."""

    parameter: str
    group: str
    algorithm: str
    optimizer_class: str
    shape: tuple[int, ...]
    placement: str
    clip: str
    settings: str
    elements: int
    state_bytes: int


def ownership(optimizer: OptimizerSet) -> list[Ownership]:
    """Every parameter that is trained, in the order of the groups."""
    names, states = iter(optimizer.parameter_names), optimizer.state
    return [
        Ownership(
            parameter=next(names),
            group=group["name"],
            algorithm=group["config"].algorithm,
            optimizer_class=group["class"],
            shape=run.shape if (run := flat(parameter)) else tuple(parameter.shape),
            placement=placement_in_words(parameter),
            clip=clip_in_words(group["config"].clip),
            settings=group["config"].describe(),
            elements=parameter.numel(),
            state_bytes=sum(v.numel() * v.element_size() for v in states.get(parameter, {}).values()),
        )
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def ownership_table(rows: Sequence[Ownership]) -> list[str]:
    """Lines for people: a heading for each group, and its parameters with the numbered layers as one."""
    lines = []
    for name in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == name]
        first, elements = members[0], sum(row.elements for row in members)
        state = sum(row.state_bytes for row in members)
        lines.append(
            f"group {name}: {first.algorithm} ({first.optimizer_class}), {first.settings}; clip: {first.clip}; "
            f"{len(members)} parameters, {elements:,} elements, {state / max(elements, 1):.2f} bytes of state each"
        )
        folded: dict[tuple[str, tuple[int, ...], str], int] = {}
        for row in members:
            key = (sub(r"\.\d+\.", ".*.", row.parameter), row.shape, row.placement)
            folded[key] = folded.get(key, 0) + 1
        width = max(len(parameter) for parameter, _, _ in folded)
        for (parameter, shape, placement), count in folded.items():
            size = " x ".join(map(str, shape)) or "1"
            lines.append(f"  {parameter:<{width}}  {count:>3} of {size:<14} {placement}")
    return lines


def ownership_record(rows: Sequence[Ownership]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def placement_in_words(parameter: Tensor) -> str:
    if not isinstance(parameter, DTensor):
        return "whole"
    shards, copies = 1, 1
    for axis, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            copies *= parameter.device_mesh.size(axis)
        else:
            shards *= parameter.device_mesh.size(axis)
    return f"{'elements' if flat(parameter) else 'rows'} over {shards}" + (f", {copies} copies" if copies > 1 else "")


def clip_in_words(clip: Clip | None) -> str:
    if isinstance(clip, ClipValue):
        return f"elements to {clip.limit:g}"
    if isinstance(clip, ClipNorm):
        return f"{clip.p if isinstance(clip.p, str) else f'{clip.p:g}'}-norm of {clip.over} to {clip.limit:g}"
    if isinstance(clip, AGC):
        return f"rows to {clip.limit:g} of their weights (agc)"
    if isinstance(clip, ZClip):
        return f"norm of {clip.over} above {clip.z:g} deviations (zclip){_and_norm(clip.max_norm)}"
    if isinstance(clip, AdaptiveClip):
        return f"adaptive, {clip.early:g} to {clip.late:g} deviations{_and_norm(clip.max_norm)}"
    return "none"


def _and_norm(limit: float | None) -> str:
    return f", norm of all to {limit:g}" if limit else ""
