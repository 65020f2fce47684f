"""A GPT that is GPT-2 or a modern one, by config."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config import ModelConfig
from disttrain.models.attention import CausalSelfAttention, build_norm, rotary_angles
from disttrain.models.kv_cache import KVCache, LayerCache
from disttrain.models.loss import chunked_cross_entropy_sum, cross_entropy_sum


class GeluMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ff_width, bias=config.bias)
        self.down = nn.Linear(config.ff_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Gated MLP of arXiv 2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.ff_width, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.ff_width, bias=config.bias)
        self.down = nn.Linear(config.ff_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, config.d_model)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = build_norm(config, config.d_model)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GeluMLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        visible: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, visible, cache)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A decoder-only transformer of `config` (its `vocab_size` set) for sequences of up to `max_length` tokens."""

    def __init__(self, config: ModelConfig, max_length: int) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("the model needs a vocab_size: take the tokenizer's with RunConfig.with_vocab_size")
        self.config = config
        self.max_length = max_length
        self.loss_chunk_tokens = 0
        """Rows of logits that the loss holds at once; 0 for all."""
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(max_length, config.d_model) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = build_norm(config, config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """One parameter for embedding and head, where the config says so; `to_empty` gives each its own storage."""
        if self.config.tie_embeddings and self.head.weight is not self.wte.weight:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits [batch, length, vocab] of `tokens` [batch, length]; with `labels`, their summed cross-entropy in nats.

        With a `cache`, `tokens` continue the columns that the model saw with it before.
        """
        x = self.wte(tokens)
        positions, visible, rotary = torch.arange(tokens.shape[1], device=tokens.device), None, None
        if cache is not None:
            positions, visible = cache.append(tokens.shape[1])
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta, like=x)
        for index, block in enumerate(self.blocks):
            x = block(x, rotary) if cache is None else block(x, rotary, visible, cache.layers[index])
        x = self.final_norm(x)
        if labels is None:
            return self.head(x)
        if self.loss_chunk_tokens:
            return chunked_cross_entropy_sum(self.head, x, labels, self.loss_chunk_tokens)
        return cross_entropy_sum(self.head(x), labels)

    @property
    def matmul_parameters(self) -> int:
        """Weights that multiply every token: all matrices but look-up tables; a tied head counts as a matrix."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and not name.startswith("w"))
        return matrices + (self.head.weight.numel() if self.config.tie_embeddings else 0)
