"""Units of adaptive clipping: parameters of one kind in one layer, chosen by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from disttrain.config.clipping import MOST_IMPORTANT, REST, AdaptiveClip, UnitRule
from disttrain.errors import UserError
from disttrain.models import ShardingPlan
from disttrain.optim.param_groups import matching

_SHOWN = 8


@dataclass(frozen=True)
class Unit:
    name: str
    """`attention_qk.3`, or `head` outside the layers."""
    importance: float
    members: list[int]
    """Positions among the group's parameters."""


def assign_units(
    group: str, names: Sequence[str], clip: AdaptiveClip, plan: ShardingPlan, edges: set[int]
) -> tuple[list[Unit], set[str]]:
    """The units of a group that owns the parameters `names`, in order of their first member; and the rules they are of.

    `edges` are the first and last layer that is trained. Raises UserError for a parameter that two rules match, and
    for an unknown role.
    """
    kinds: dict[str, UnitRule] = {}
    problems = []
    for rule in clip.unit_rules:
        try:
            found = {name for pattern in _known(rule, clip, plan) for name in matching(pattern, names, plan.roles)}
        except UserError as error:
            raise UserError(f"optim: group {group}: clip.units {rule.name}: {error}") from error
        problems += [
            f"optim: group {group}: clip.units {kinds[name].name} and {rule.name} both match {name}; a parameter "
            "belongs to one unit: narrow one of the rules"
            for name in sorted(found & kinds.keys())
        ]
        kinds |= dict.fromkeys(found, rule)
    if problems:
        more = len(problems) - _SHOWN
        raise UserError([*problems[:_SHOWN], *([f"and {more} more like this"] if more > 0 else [])])
    members: dict[tuple[str, int], list[int]] = {}
    for position, name in enumerate(names):
        kind = kinds[name].name if name in kinds else REST
        members.setdefault((kind, layer_of(name, plan)), []).append(position)
    units = [
        Unit(
            name=kind if layer < 0 else f"{kind}.{layer}",
            importance=_importance(kinds.get(names[positions[0]]), clip, layer in edges),
            members=positions,
        )
        for (kind, layer), positions in members.items()
    ]
    return units, {rule.name for rule in kinds.values()}


def layer_of(name: str, plan: ShardingPlan) -> int:
    """-1 for a parameter outside the layers."""
    found = re.search(plan.layer, name) if plan.layer else None
    return int(found[1]) if found else -1


def _known(rule: UnitRule, clip: AdaptiveClip, plan: ShardingPlan) -> list[str]:
    """The rules that hold without being said are made for any model: one that lacks a role has no such parameters."""
    return [p for p in rule.match if clip.units or p.removeprefix("role:") in plan.roles]


def _importance(rule: UnitRule | None, clip: AdaptiveClip, edge: bool) -> float:
    own = rule.importance if rule else 1.0
    return min(MOST_IMPORTANT, own * clip.edge_importance) if edge else own
