"""Every trainable parameter in exactly one group: ordered rules, first match wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from disttrain.config.groups import Group
from disttrain.errors import UserError

_ROLE = "role:"
_SHOWN = 8


def assign_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    groups: Sequence[Group],
    roles: Mapping[str, str],
    empty_groups: bool = False,
) -> list[tuple[Group, dict[str, nn.Parameter]]]:
    """The groups that own something, each with its parameters by name.

    Frozen parameters belong to none. With `empty_groups` (rules made for any model) a rule may match nothing.
    Raises UserError for an unknown role, a rule without a match or with nothing left to own, and unowned parameters.
    """
    trainable = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    owned: dict[str, dict[str, nn.Parameter]] = {group.name: {} for group in groups}
    taken: dict[str, str] = {}
    problems: list[str] = []
    for group in groups:
        matched: set[str] = set()
        for rule in group.match:
            try:
                found = set(matching(rule, trainable, roles))
            except UserError as error:
                problems.append(f"group {group.name}: {error}")
                continue
            if not found and not empty_groups:
                problems.append(f"group {group.name}: {rule!r} matches none of the parameters: {_listed(trainable)}")
            matched |= found
        for name in (name for name in trainable if name in matched and name not in taken):
            owned[group.name][name], taken[name] = trainable[name], group.name
        if matched and not owned[group.name] and not empty_groups:
            owners = ", ".join(sorted({taken[name] for name in matched}))
            problems.append(
                f"group {group.name}: owns nothing: {owners} before it took all {len(matched)} parameters that it "
                "matches; move it up or take it out"
            )
    if unowned := [name for name in trainable if name not in taken]:
        problems.append(
            f"no group matches {_listed(unowned)}; add a rule, or a last group with match = ['.*'] for the rest"
        )
    if problems:
        raise UserError(f"optim.groups: {problem}" for problem in problems)
    return [(group, owned[group.name]) for group in groups if owned[group.name]]


def matching(rule: str, names: Iterable[str], roles: Mapping[str, str]) -> list[str]:
    """Those of `names` that a rule matches: a regular expression, or `role:NAME`. UserError for an unknown role."""
    pattern = roles.get(rule.removeprefix(_ROLE)) if rule.startswith(_ROLE) else rule
    if pattern is None:
        raise UserError(f"there is no {rule}; the model has {', '.join(_ROLE + role for role in roles)}")
    return [name for name in names if re.search(pattern, name)]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
