"""QK-Clip (Kimi K2, arXiv 2507.20534): query and key weights of heads with too large logits are scaled back.

It acts on weights after a step, never on gradients or on the forward pass; docs/clipping.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.config.clipping import QKClipConfig
from disttrain.errors import UserError
from disttrain.models.attention import CausalSelfAttention
from disttrain.models.attention_logits import LogitWatch
from disttrain.optim.sharding import first_element, local

FLEX_HEAD_DIM = 16
"""Narrower heads are refused by flex attention's kernel."""


@dataclass(frozen=True)
class AttentionLogits:
    """What a step showed: device tensors [layers, heads], equal on all ranks."""

    largest: Tensor
    """The largest logit over batch, microbatches and ranks, or what it is at most."""
    scales: Tensor
    """What the head's logits are multiplied by from now on; 1 for heads that were left alone."""


def qk_clip_scales(largest: Tensor, kv_heads: int, config: QKClipConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Of maxima [..., heads] the factors of the logits and queries [..., heads], and of the keys [..., kv_heads].

    The factors of a query and its key multiply to min(1, threshold / maximum), so that each head is at its own limit,
    also where heads share a key. A maximum that is not finite changes nothing.
    """
    above = (largest > config.threshold) & largest.isfinite()
    gamma = torch.where(above, config.threshold / largest, 1.0)
    group = largest.shape[-1] // kv_heads
    alpha = 1.0 if group > 1 and config.grouped == "q_only" else config.alpha
    key = gamma.unflatten(-1, (kv_heads, group)).amin(-1) ** (1.0 - alpha)
    return gamma, gamma / key.repeat_interleave(group, dim=-1), key


class QKClip:
    """Watches every attention layer of `model` from now on; `points` are tensors that live in a weight's place.

    Raises UserError for a model without attention, with frozen queries or keys, or with QK-norm, which would undo the
    scaling.
    """

    def __init__(
        self, model: nn.Module, config: QKClipConfig, device: torch.device, points: Mapping[nn.Parameter, list[Tensor]]
    ) -> None:
        self.config, self.points = config, points
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, CausalSelfAttention)}
        if not self.layers:
            raise UserError("optim.qk_clip: the model has no attention layer; set optim.qk_clip.mode = 'off'")
        if config.mode == "clip":
            self._check_weights()
        head_dim = min(attention.head_dim for attention in self.layers.values())
        method, length = _method(config, device, head_dim), getattr(model, "max_length", None)
        self.watches = []
        for attention in self.layers.values():
            dtype = torch.promote_types(attention.wq.weight.dtype, torch.float32)
            attention.logit_watch = LogitWatch(attention.heads, method, device, dtype, length)
            self.watches.append(attention.logit_watch)

    def describe(self) -> str:
        """In one line, for the start of a run."""
        config, method = self.config, self.watches[0].method
        if config.mode == "log":
            return f"attention logits are watched ({method}), nothing is done about them"
        first = next(iter(self.layers.values()))
        shared = f", keys shared by {first.heads // first.kv_heads} heads: {config.grouped}"
        return f"QK-Clip: heads to {config.threshold:g} ({method}{shared if first.heads > first.kv_heads else ''})"

    @torch.no_grad()
    def dist_apply(self, skipped: Tensor) -> AttentionLogits:
        """After the optimizer's step: one maximum over all ranks, then every rank scales the rows that it holds.

        Nothing changes where the scalar `skipped` is not 0. The watch begins anew.
        """
        largest = torch.stack([watch.maxima for watch in self.watches])
        # A maximum of NaN and a number would depend on the order; neither is finite.
        largest = torch.where(largest.isnan(), math.inf, largest)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        for watch in self.watches:
            watch.reset()
        if self.config.mode != "clip":
            return AttentionLogits(largest, torch.ones_like(largest))
        seen = torch.where(skipped.to(largest.device) != 0, -math.inf, largest)
        scales = []
        for attention, maxima in zip(self.layers.values(), seen, strict=True):
            gamma, query, key = qk_clip_scales(maxima, attention.kv_heads, self.config)
            self._scale(attention.wq, query, attention.head_dim)
            self._scale(attention.wk, key, attention.head_dim)
            scales.append(gamma)
        return AttentionLogits(largest, torch.stack(scales))

    def _check_weights(self) -> None:
        for name, attention in self.layers.items():
            if attention.has_qk_norm:
                raise UserError(
                    f"optim.qk_clip: {name} normalises queries and keys, which undoes any scaling of weights; leave "
                    "one of the two out, or set optim.qk_clip.mode = 'log'"
                )
            weights = [*attention.wq.parameters(), *attention.wk.parameters()]
            if any(parameter not in self.points for parameter in weights):
                raise UserError(
                    f"optim.qk_clip: {name} has frozen weights, which it may not scale; set its mode to 'log'"
                )

    def _scale(self, projection: nn.Linear, factors: Tensor, head_dim: int) -> None:
        """Multiply the rows of each head: those of the weight and of the bias, wherever they are."""
        rows = factors.repeat_interleave(head_dim)
        for parameter in projection.parameters():
            for tensor in self.points[parameter]:
                held = local(tensor)
                first = first_element(parameter) // parameter.shape[1:].numel()
                own = rows[first : first + held.shape[0]].to(held.device, held.dtype)
                held.mul_(own if held.ndim == 1 else own[:, None])


def _method(config: QKClipConfig, device: torch.device, head_dim: int) -> str:
    if config.logits == "auto" and device.type == "cuda":
        return "flex" if head_dim >= FLEX_HEAD_DIM else "exact"
    if config.logits == "auto":
        return "bound"
    needed = {"bound": "cpu", "flex": "cuda"}.get(config.logits, device.type)
    if needed != device.type:
        raise UserError(
            f"optim.qk_clip.logits = '{config.logits}' works on {needed}, and the run is on {device.type}; "
            "set it to 'auto' or 'exact'"
        )
    if config.logits == "flex" and head_dim < FLEX_HEAD_DIM:
        raise UserError(
            f"optim.qk_clip.logits = 'flex' needs heads of {FLEX_HEAD_DIM} numbers, not {head_dim}; use 'exact'"
        )
    return config.logits
