"""The shape of the GPT."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import model_validator

from disttrain.config.base import PositiveFloat, PositiveInt, Section


class ModelConfig(Section):
    """Defaults are GPT-2's choices; `rope`, `rmsnorm`, `swiglu`, fewer `n_kv_heads` and no `bias` make it modern."""

    n_layers: PositiveInt = 6
    d_model: PositiveInt = 384
    n_heads: PositiveInt = 6
    n_kv_heads: PositiveInt | None = None
    """Key and value heads; fewer than `n_heads` is grouped-query attention. Default: `n_heads`."""
    d_ff: PositiveInt | None = None
    """Width of the MLP. Default: 4 d_model (gelu), 8/3 d_model rounded up to a multiple of 32 (swiglu)."""
    vocab_size: PositiveInt | None = None
    """Default: the tokenizer's. Token files (.bin) without a tokenizer need it set."""
    position: Literal["learned", "rope"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    qk_norm: bool = False
    bias: bool = True
    tie_embeddings: bool = True
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10_000.0
    init: Literal["gpt2", "xavier", "t5", "small"] = "gpt2"
    """Scheme of the initial weights; formulas and sources in `disttrain/models/init.py`."""
    init_std: PositiveFloat = 0.02
    """For `init = "gpt2"`, and for the embeddings of "xavier"; the other schemes follow from the shape alone."""

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def ff_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.mlp == "gelu" else -(-8 * self.d_model // (3 * 32)) * 32

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model = {self.d_model} does not split into n_heads = {self.n_heads} equal heads; "
                f"nearest: d_model = {max(1, round(self.d_model / self.n_heads)) * self.n_heads}"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.kv_heads}: each key head serves "
                f"equally many query heads; nearest: n_kv_heads = {math.gcd(self.n_heads, self.kv_heads)}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rope turns pairs of numbers: d_model / n_heads = {self.head_dim} must be even")
        return self
