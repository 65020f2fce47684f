"""Which data-parallel strategy over which mesh, in which precision, and what is traded for memory."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from disttrain.config.base import NonNegativeInt, PositiveInt, Section

Strategy = Literal["ddp", "zero1", "zero2", "fsdp", "hsdp"]
Precision = Literal["fp32", "bf16", "fp16"]


class ParallelConfig(Section):
    """docs/strategies.md says which to choose, and counts what each communicates."""

    strategy: Strategy = "fsdp"
    dp_replicate: PositiveInt | None = None
    """Processes that hold the same shard. Default: all under ddp, 1 under zero1, zero2, fsdp; hsdp wants it set."""
    dp_shard: PositiveInt | None = None
    """Processes that a parameter is cut over. Default: 1 under ddp, else all that dp_replicate leaves."""
    reshard_after_forward: bool | None = None
    """fsdp and hsdp only: free the gathered weights of blocks between forward and backward (default), or keep them."""
    grad_accumulation: Literal["sharded", "unsharded"] | None = None
    """fsdp and hsdp only. `sharded` (default): gradients are reduced after every microbatch (least memory);
    `unsharded`: after the last one (least communication, a whole gradient per process)."""
    param_dtype: Precision = "fp32"
    """What weights are cast to for computing; the weights that the optimizer sees stay fp32."""
    reduce_dtype: Precision = "fp32"
    """What gradients travel in: fp32, or the same as param_dtype."""
    activation_checkpointing: Literal["none", "full", "every_n", "selective"] = "none"
    """Recompute activations in the backward: of all blocks, of each n-th, or of all but the expensive operations
    (matrix products and attention)."""
    activation_checkpointing_every: PositiveInt | None = None
    """The n of every_n. Default: 2."""
    loss_chunk_tokens: NonNegativeInt = 0
    """Compute the loss in chunks of so many tokens, so that the whole logits never exist; 0: at once."""
    cpu_offload: bool = False
    """Keep sharded weights and optimizer state in host memory and step there (zero1, zero2, fsdp, hsdp on CUDA)."""
    compile: bool = False
    """torch.compile each block."""

    @property
    def shards(self) -> bool:
        return self.strategy != "ddp"

    @model_validator(mode="after")
    def _settings_fit_the_strategy(self) -> Self:
        for name in ("reshard_after_forward", "grad_accumulation"):
            if getattr(self, name) is not None and self.strategy not in ("fsdp", "hsdp"):
                raise ValueError(
                    f"{name} is for fsdp and hsdp: {self.strategy} decides it itself; leave it out or change strategy"
                )
        if self.reduce_dtype not in ("fp32", self.param_dtype):
            raise ValueError(
                f"reduce_dtype = {self.reduce_dtype} with param_dtype = {self.param_dtype}: gradients come in "
                f"{self.param_dtype}; reduce in fp32 (exact sums) or {self.param_dtype} (half the bytes)"
            )
        if self.activation_checkpointing_every is not None and self.activation_checkpointing != "every_n":
            raise ValueError('activation_checkpointing_every needs activation_checkpointing = "every_n"')
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "compile does not go with selective activation_checkpointing: use full, every_n or none, or no compile"
            )
        if self.cpu_offload and not self.shards:
            raise ValueError(
                "cpu_offload moves shards to host memory, and ddp has none: use zero1, zero2, fsdp or hsdp"
            )
        return self
