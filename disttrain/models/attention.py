"""Causal self-attention with grouped key/value heads, rotary positions and optional QK-norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config import ModelConfig
from disttrain.models.attention_logits import LogitWatch
from disttrain.models.kv_cache import LayerCache


def build_norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def rotary_angles(positions: Tensor, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., 1, length, head_dim / 2] of RoPE (arXiv 2104.09864) at `positions` [..., length].

    Computed in fp32 or better; the 1 stands for the heads.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    rates = theta ** (-torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim)
    angles = positions.to(dtype)[..., None, :, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim/2) of `x` [..., length, head_dim] by the angles of their positions."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """[batch, length, d_model] to the same. q, k, v are separate matrices: optimizers and clipping tell them apart."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        # A bool that is there: compilation makes numbers symbols, and the kernel takes no comparison of these.
        self.grouped = config.n_heads != config.kv_heads
        self.has_qk_norm = config.qk_norm
        d_kv = config.kv_heads * config.head_dim
        self.wq = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.wk = nn.Linear(config.d_model, d_kv, bias=config.bias)
        self.wv = nn.Linear(config.d_model, d_kv, bias=config.bias)
        self.wo = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.logit_watch: LogitWatch | None = None
        """Where set, remembers the largest logits of forward passes that are trained on."""

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        visible: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Each token sees itself and all before it, or in generation what `visible` says of the columns of `cache`."""
        q = self.q_norm(self._heads(self.wq(x)))
        k = self.k_norm(self._heads(self.wk(x)))
        v = self._heads(self.wv(x))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        if self.logit_watch is not None and visible is None and torch.is_grad_enabled():
            return self.wo(self.logit_watch.attend(q, k, v).transpose(1, 2).flatten(2))
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, enable_gqa=self.grouped)
        return self.wo(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, length, heads * head_dim] to [batch, heads, length, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
