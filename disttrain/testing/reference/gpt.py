"""The GPT once more, from formulas: no modules, no fused attention, one head at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from disttrain.config import ModelConfig

Weights = Mapping[str, Tensor]


def reference_logits(
    config: ModelConfig, weights: Weights, tokens: Tensor, scores: list[Tensor] | None = None
) -> Tensor:
    """Logits [batch, length, vocab] of `tokens` [batch, length] under `weights` named as the GPT's parameters.

    `scores` gets each layer's masked attention scores [heads, batch, length, length].
    """
    length = tokens.shape[1]
    x = weights["wte.weight"][tokens]
    if config.position == "learned":
        x = x + weights["wpe.weight"][:length]
    for layer in range(config.n_layers):
        block = {n.removeprefix(f"blocks.{layer}."): w for n, w in weights.items() if n.startswith(f"blocks.{layer}.")}
        x = x + _attention(config, block, _norm(config, block, "attention_norm", x), [] if scores is None else scores)
        x = x + _mlp(config, block, _norm(config, block, "mlp_norm", x))
    head = weights["wte.weight"] if config.tie_embeddings else weights["head.weight"]
    return _norm(config, weights, "final_norm", x) @ head.T


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def _mlp(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    up = _linear(weights, "mlp.up", x)
    if config.mlp == "swiglu":
        gate = _linear(weights, "mlp.gate", x)
        return _linear(weights, "mlp.down", gate / (1 + torch.exp(-gate)) * up)
    gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return _linear(weights, "mlp.down", gelu)


def _attention(config: ModelConfig, weights: Weights, x: Tensor, seen: list[Tensor]) -> Tensor:
    width, length = config.head_dim, x.shape[1]
    q, k, v = (_linear(weights, f"attention.w{name}", x) for name in "qkv")
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    heads, of_heads = [], []
    for head in range(config.n_heads):
        shared = head // (config.n_heads // config.kv_heads)
        q_head = q[..., head * width : (head + 1) * width]
        k_head, v_head = (z[..., shared * width : (shared + 1) * width] for z in (k, v))
        if config.qk_norm:
            q_head = _norm(config, weights, "attention.q_norm", q_head)
            k_head = _norm(config, weights, "attention.k_norm", k_head)
        if config.position == "rope":
            q_head, k_head = _rope(config, q_head), _rope(config, k_head)
        scores = (q_head @ k_head.transpose(1, 2) / math.sqrt(width)).masked_fill(future, -math.inf)
        of_heads.append(scores.detach())
        weight = torch.exp(scores - scores.max(-1, keepdim=True).values)
        heads.append(weight / weight.sum(-1, keepdim=True) @ v_head)
    seen.append(torch.stack(of_heads))
    return _linear(weights, "attention.wo", torch.cat(heads, -1))


def _rope(config: ModelConfig, x: Tensor) -> Tensor:
    """Each pair (i, i + half) is one complex number, turned by position times theta^(-2i / width)."""
    half = x.shape[-1] // 2
    rates = config.rope_theta ** (-2 * torch.arange(half, dtype=x.dtype) / x.shape[-1])
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * rates
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)
