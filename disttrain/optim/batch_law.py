"""Each group's hyperparameters at every step: its schedule, and what the batch makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disttrain.config.groups import (
    SGD,
    Adafactor,
    Adam,
    AdamW,
    AdEMAMix,
    Custom,
    Group,
    Lion,
    RMSProp,
    ScheduleFreeAdamW,
)
from disttrain.config.matrix_groups import MatrixGroup
from disttrain.config.schedule import GroupSchedule, ScheduleConfig
from disttrain.errors import UserError
from disttrain.optim.optimizer_set import OptimizerSet
from disttrain.schedule import LrSchedule, Rule, Scaled, scale_by_batch

_FOLLOWING = ("weight_decay", "eps", "betas", "alpha")
_COUPLED = (SGD, RMSProp, Adam, Custom)
"""Their decay is added to the gradient, and has no time scale of its own; or it is not known what theirs is."""
_NOT_ADAM = (Lion, Adafactor, Custom, ScheduleFreeAdamW)


@dataclass(frozen=True)
class GroupLaw:
    """How one group's settings go."""

    schedule: LrSchedule
    rule: Rule


class BatchLaw:
    """Sets the hyperparameters of `optimizer` before each step; they are computed from the position, never restored.

    `laws` are one for each of the optimizer's groups, in their order. Raises UserError for a rule that a batch of
    `batches_tokens` would break.
    """

    def __init__(
        self, optimizer: OptimizerSet, laws: Sequence[GroupLaw], config: ScheduleConfig, batches_tokens: Sequence[int]
    ) -> None:
        self.groups, self.laws, self.config = optimizer.param_groups, laws, config
        self._tuned: list[Group] = [group["config"] for group in self.groups]
        self._batch_tokens = 0
        self._followed: set[str] = set()
        for tokens in batches_tokens:
            for group, law in zip(self._tuned, laws, strict=True):
                self._scaled(group, law, tokens)

    def lr_factors(self, reached_tokens: int, batch_tokens: int) -> list[float]:
        """Of each group, for a step of `batch_tokens` that ends at `reached_tokens`."""
        return [
            self._scaled(group, law, batch_tokens).lr * law.schedule.factor(reached_tokens)
            for group, law in zip(self._tuned, self.laws, strict=True)
        ]

    def follow(self, batch_tokens: int) -> list[str]:
        """Set what steps of `batch_tokens` go by besides their rates; lines to tell when that is another batch."""
        return [] if batch_tokens == self._batch_tokens else self._follow(batch_tokens)

    def _follow(self, batch_tokens: int) -> list[str]:
        self._batch_tokens, notes = batch_tokens, []
        for group, law, tuned in zip(self.groups, self.laws, self._tuned, strict=True):
            scaled = self._scaled(tuned, law, batch_tokens)
            settings = scaled_settings(tuned, scaled)
            group["config"] = tuned.model_copy(update=settings)
            group.update({key: getattr(group["config"], key) for key in _FOLLOWING if key in group})
            if changed := [f"{key} {_said(getattr(tuned, key))} -> {_said(new)}" for key, new in settings.items()]:
                notes.append(f"group {tuned.name}: {', '.join(changed)} ({law.rule})")
                self._followed.add(tuned.name)
            elif tuned.name in self._followed:
                notes.append(f"group {tuned.name}: as tuned ({law.rule})")
        if not notes:
            return []
        base = self.config.base_batch_tokens or 0
        k = batch_tokens / base
        return [f"batch of {batch_tokens:,} tokens, {k:.4g} times the base of {base:,}:", *notes]

    def _scaled(self, group: Group, law: GroupLaw, batch_tokens: int) -> Scaled:
        base = self.config.base_batch_tokens
        if law.rule == "none" or base is None or base == batch_tokens:
            return Scaled()
        betas = getattr(group, "betas", None) or ((group.alpha,) if hasattr(group, "alpha") else None)
        decoupled = self.config.keep_decay_timescale and group.weight_decay > 0 and not isinstance(group, _COUPLED)
        try:
            return scale_by_batch(law.rule, batch_tokens / base, betas, decoupled)
        except ValueError as error:
            raise UserError(f"schedule.batch_lr_rule: group {group.name}: {error}") from error


def group_rule(group: Group, own: GroupSchedule | None, shared: ScheduleConfig) -> Rule:
    """The rule of a group: its own, else that of its kind of algorithm."""
    if own is not None and own.batch_lr_rule is not None:
        if own.batch_lr_rule == "sqrt_full" and not isinstance(group, Adam | AdamW | RMSProp | AdEMAMix):
            raise UserError(
                f"group {group.name}: batch_lr_rule = 'sqrt_full' is derived for Adam and its kin, not for "
                f"{group.algorithm}; use 'sqrt' or 'linear'"
            )
        return own.batch_lr_rule
    rule = shared.rule
    if rule == "none":
        return rule
    if isinstance(group, MatrixGroup):
        return shared.matrix_lr_rule
    if isinstance(group, SGD):
        return "linear"
    # What sqrt_full does to betas and eps is derived for Adam; the others follow with their rate alone.
    return "sqrt" if rule == "sqrt_full" and isinstance(group, _NOT_ADAM) else rule


def scaled_settings(group: Group, scaled: Scaled) -> dict[str, Any]:
    """The settings that differ from those of `group`."""
    settings: dict[str, Any] = {"lr": group.lr * scaled.lr, "weight_decay": group.weight_decay * scaled.weight_decay}
    if hasattr(group, "eps"):
        settings["eps"] = group.eps * scaled.eps
    if scaled.betas is not None and hasattr(group, "betas"):
        settings["betas"] = scaled.betas
    elif scaled.betas is not None:
        [settings["alpha"]] = scaled.betas
    return {key: value for key, value in settings.items() if value != getattr(group, key)}


def _said(value: float | tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in value) + ")" if isinstance(value, tuple) else f"{value:.4g}"
