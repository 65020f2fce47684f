"""Gradient norms over any mix of layouts by one all-reduce, and clipping by group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.config.clipping import AGC, AdaptiveClip, Clip, ClipNorm, ClipValue, ZClip
from disttrain.errors import UserError
from disttrain.models import ShardingPlan
from disttrain.optim.clip_rules import AGCRule, ClipRule, Decision, NormRule, Seen, ValueRule, clip_scale
from disttrain.optim.clip_statistics import AdaptiveRule, ZClipRule
from disttrain.optim.clip_units import assign_units, layer_of
from disttrain.optim.held_gradients import HeldGradients, norm_of_entry
from disttrain.optim.param_groups import matching
from disttrain.optim.sharding import local, world_size

Groups = Sequence[Mapping[str, Any]]
Accepts = Callable[[Tensor, Tensor], Tensor]
_NO_PLAN = ShardingPlan((), {}, ())
_STATE = "service.clip"
"""A checkpoint without these histories loads too: they begin anew."""


@dataclass(frozen=True)
class UnitClips:
    """Of everything that is clipped by its history, in the order of `GradientClipper.unit_names`; fp64."""

    norms: Tensor
    """[units] before clipping."""
    thresholds: Tensor
    """[units] infinite in the warm-up."""
    scales: Tensor
    """[units] at most 1; without the limit on the norm of all."""
    streaks: Tensor
    """[units] for how many steps in a row a unit has been cut below one half."""


@dataclass(frozen=True)
class GradientNorms:
    """Device tensors in fp64, equal on all ranks; groups and parameters in the order of the optimizer's groups."""

    total: Tensor
    """The 2-norm of all gradients together, before clipping, without the loss scale."""
    parameters: Tensor
    """[parameters] 2-norms; 0 for a parameter without a gradient."""
    groups: Tensor
    """[groups] 2-norms."""
    scales: Tensor
    """[groups] what each group's norm was multiplied by, as far as whole parts are scaled: at most 1."""
    shares: Tensor
    """[groups] how much was clipped: 0 or 1 by norm, of adaptive clipping the share of units, by value that of
    elements, of agc that of rows."""
    units: UnitClips | None = None
    extras: Tensor | None = None
    """The caller's own numbers, summed over ranks."""


class GradientClipper:
    """The rules of torch's parameter groups, each with its section as `config`, and what they remember.

    `names` are those of all parameters in the order of the groups, `steps` the length of the run; rules that choose by
    name need both and the model's `plan`. Raises UserError for rules that do not fit the parameters.
    """

    def __init__(
        self, groups: Groups, names: Sequence[str] = (), plan: ShardingPlan = _NO_PLAN, steps: int | None = None
    ) -> None:
        self.groups, self.plan, self.steps = groups, plan, steps
        named = iter(names)
        names_of = [[next(named, "") for _ in group["params"]] for group in groups]
        layers = {layer_of(name, plan) for name in names} - {-1}
        self._edges = {min(layers), max(layers)} if layers else set()
        self._unused: dict[AdaptiveClip, set[str]] = {}
        self._held = [HeldGradients(group["params"], world_size()) for group in groups]
        self.rules = [self._rule(*pair) for pair in zip(groups, names_of, strict=True)]
        if problems := [
            f"optim: clip.units {name} matches none of the parameters that are clipped this way; correct it or take it "
            "out"
            for unused in self._unused.values()
            for name in sorted(unused)
        ]:
            raise UserError(problems)

    @property
    def unit_names(self) -> list[str]:
        return [name for name, _ in self._histories()]

    def notes(self) -> list[str]:
        """What a user should know at the start of a run."""
        return [
            f"group {group['name']}: adaptive clipping only looks for its first {rule.clip.warmup_steps} steps, and "
            f"the run has {self.steps}; lower clip.warmup_steps"
            for group, rule in zip(self.groups, self.rules, strict=True)
            if isinstance(rule, AdaptiveRule) and self.steps is not None and rule.clip.warmup_steps >= self.steps
        ]

    @torch.no_grad()
    def dist_clip(self, unscale: Tensor, extras: Tensor | None = None, accepts: Accepts | None = None) -> GradientNorms:
        """Multiply all gradients by `unscale` (a scalar), then clip each group by its rule, in place.

        `extras` [n] are summed over ranks on the way; `accepts` looks at the norm of all gradients and at these sums,
        and where it says no (a scalar), or the norm is not finite, no rule learns from the step.

        One all-reduce over the world, whatever the groups ask for: each rank adds what it holds, divided by the number
        of ranks that hold the same, and empty shards add zero. Ranks must hold the same groups and reduced gradients.
        """
        seen, unscale, extras = self._dist_see(unscale, extras, accepts)
        decisions = [rule.decide(one) for rule, one in zip(self.rules, seen, strict=True)]
        parts = [rule.part_squares(one.squares) for rule, one in zip(self.rules, seen, strict=True)]
        on_top = self._on_top(decisions, parts)
        for rule, decision, held, extra in zip(self.rules, decisions, self._held, on_top, strict=True):
            held.multiply(rule.parts, decision.factors * extra * unscale)
            rule.finish(held)
            held.forget()
        squares = torch.stack([part.sum() for part in parts])
        clipped = [
            ((decision.factors * extra).square() * part).sum()
            for decision, extra, part in zip(decisions, on_top, parts, strict=True)
        ]
        return GradientNorms(
            total=squares.sum().sqrt(),
            parameters=torch.cat([one.squares for one in seen]).sqrt(),
            groups=squares.sqrt(),
            scales=torch.where(squares == 0, 1.0, (torch.stack(clipped) / squares).sqrt()),
            shares=torch.stack([decision.share for decision in decisions]),
            units=self._units(decisions),
            extras=extras,
        )

    def state(self) -> dict[str, Tensor]:
        """What rules remember, by group and unit; a load writes into it."""
        return {f"{_STATE}.{name}": row for name, row in self._histories()}

    def _histories(self) -> list[tuple[str, Tensor]]:
        pairs = zip(self.groups, self.rules, strict=True)
        return [
            (f"{group['name']}.{name}", row)
            for group, rule in pairs
            for name, row in zip(rule.names, rule.state, strict=True)
        ]

    def _rule(self, group: Mapping[str, Any], names: list[str]) -> ClipRule:
        clip: Clip | None = group["config"].clip
        count, device = len(names), local(group["params"][0]).device
        if isinstance(clip, ClipValue):
            return ValueRule(clip, count)
        if isinstance(clip, ClipNorm):
            return NormRule(clip, count)
        if isinstance(clip, AGC):
            return AGCRule(clip, count, self._skipped(group, clip, names))
        if isinstance(clip, ZClip):
            return ZClipRule(clip, count, device)
        if isinstance(clip, AdaptiveClip):
            return self._adaptive_rule(group["name"], clip, names, device)
        return ClipRule(count)

    def _skipped(self, group: Mapping[str, Any], clip: AGC, names: list[str]) -> set[int]:
        if clip.skip and not any(names):
            raise UserError("clip: agc skips parameters by name; make a GradientClipper with names, or set skip = []")
        # What holds without being said is made for any model: one that lacks the role has no such parameters.
        said = "skip" in clip.model_fields_set
        rules = [rule for rule in clip.skip if said or rule.removeprefix("role:") in self.plan.roles]
        try:
            skipped = {name for rule in rules for name in matching(rule, names, self.plan.roles)}
        except UserError as error:
            raise UserError(f"optim: group {group['name']}: clip.skip: {error}") from error
        return {index for index, name in enumerate(names) if name in skipped}

    def _adaptive_rule(self, group: str, clip: AdaptiveClip, names: list[str], device: torch.device) -> AdaptiveRule:
        if clip.tighten_until is None and self.steps is None:
            raise UserError(f"optim: group {group}: without the run's steps, clip.tighten_until must be set")
        until = clip.tighten_until or max(1, (self.steps or 0) // 2)
        if until <= clip.tighten_from:
            raise UserError(
                f"optim: group {group}: clip.tighten_from = {clip.tighten_from} is not before the end of the schedule, "
                f"step {until} (half of the run); lower it, or set clip.tighten_until"
            )
        units, used = assign_units(group, names, clip, self.plan, self._edges)
        self._unused.setdefault(clip, {rule.name for rule in clip.units}).difference_update(used)
        return AdaptiveRule(clip, units, until, device)

    def _dist_see(
        self, unscale: Tensor, extras: Tensor | None, accepts: Accepts | None
    ) -> tuple[list[Seen], Tensor, Tensor]:
        """What all ranks hold of each group, `unscale` where the gradients are, and the sums of `extras`."""
        # Offloaded gradients lie on the host, the scale with the model.
        unscale = unscale.to(self._held[0].device, torch.float64)
        for held in self._held:
            held.look()
        shared = {rule.order for rule in self.rules if rule.order and rule.over == "all"}
        orders = [sorted((shared | ({rule.order} if rule.order else set())) - {2.0}) for rule in self.rules]
        entries = [
            [one.powers(2.0), *(one.entry(order) for order in wanted), *rule.entries(one, unscale)]
            for one, wanted, rule in zip(self._held, orders, self.rules, strict=True)
        ]
        own = unscale.new_empty(0) if extras is None else extras.to(unscale)
        parts = [*(entry for group in entries for entry in group), own]
        sums = torch.cat(parts)
        dist.all_reduce(sums)
        pieces = iter(sums.split([len(part) for part in parts]))
        squares, norms, rest = [], [], []
        for wanted, group in zip(orders, entries, strict=True):
            squares.append(next(pieces) * unscale.square())
            found = {order: unscale * norm_of_entry(next(pieces), order) for order in wanted}
            norms.append(found | {2.0: squares[-1].sum().sqrt()})
            rest.append([next(pieces) for _ in range(len(group) - 1 - len(wanted))])
        total, extras = torch.cat(squares).sum().sqrt(), next(pieces)
        finite = torch.isfinite(total) if accepts is None else torch.isfinite(total) & accepts(total, extras)
        seen = [
            Seen(own, _Norms(norms, index), sums, finite)
            for index, (own, sums) in enumerate(zip(squares, rest, strict=True))
        ]
        return seen, unscale, extras

    def _on_top(self, decisions: list[Decision], parts: list[Tensor]) -> list[Tensor | float]:
        """For each group the factor by which the norm of all groups that have such a limit is brought down to it."""
        limited = [index for index, rule in enumerate(self.rules) if rule.max_norm]
        if not limited:
            return [1.0] * len(self.rules)
        squares = [(decisions[index].factors.square() * parts[index]).sum() for index in limited]
        together = torch.stack(squares).sum().sqrt()
        return [clip_scale(together, rule.max_norm) if rule.max_norm else 1.0 for rule in self.rules]

    def _units(self, decisions: list[Decision]) -> UnitClips | None:
        pairs = [(rule, d) for rule, d in zip(self.rules, decisions, strict=True) if d.thresholds is not None]
        if not pairs:
            return None
        return UnitClips(
            norms=torch.cat([d.norms for _, d in pairs if d.norms is not None]),
            thresholds=torch.cat([d.thresholds for _, d in pairs if d.thresholds is not None]),
            scales=torch.cat([d.factors for _, d in pairs]),
            streaks=torch.cat([rule.state[:, 3] for rule, _ in pairs]),
        )


def dist_clip_gradients(groups: Groups, unscale: Tensor) -> GradientNorms:
    """As `GradientClipper.dist_clip`, for a loop of one's own whose rules need no memory and no names."""
    if any(isinstance(group["config"].clip, AdaptiveClip | ZClip) for group in groups):
        raise UserError("clip: adaptive and zclip remember norms; make a GradientClipper once and call its dist_clip")
    return GradientClipper(groups).dist_clip(unscale)


@dataclass(frozen=True)
class _Norms:
    """Norms by order, of each group."""

    norms: Sequence[Mapping[float, Tensor]]
    index: int

    def __call__(self, order: float, over: str) -> Tensor:
        if over == "group":
            return self.norms[self.index][order]
        stacked = torch.stack([found[order] for found in self.norms])
        return stacked.max() if order == float("inf") else (stacked**order).sum() ** (1 / order)
