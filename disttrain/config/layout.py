"""The mesh and batch arithmetic: pure, printable, with the products in every refusal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the mesh axes; their product is the number of processes."""

    dp_replicate: int
    dp_shard: int

    @property
    def batch(self) -> int:
        """Processes that read different samples."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard}"

    @staticmethod
    def resolve(strategy: str, dp_replicate: int | None, dp_shard: int | None, world: int) -> ParallelDims:
        """Fill in what the config left open for `world` processes; ValueError with the arithmetic if nothing fits."""
        if strategy == "ddp":
            dims = ParallelDims(dp_replicate or world, dp_shard or 1)
        elif strategy == "hsdp":
            dims = _hsdp(dp_replicate, dp_shard, world)
        else:
            dims = ParallelDims(dp_replicate or 1, dp_shard or world)
        if strategy == "ddp" and dims.dp_shard > 1:
            raise ValueError(f"parallel.dp_shard = {dims.dp_shard}: ddp does not shard; set it to 1 or use fsdp")
        if strategy in ("zero1", "zero2", "fsdp") and dims.dp_replicate > 1:
            raise ValueError(f"parallel.dp_replicate = {dims.dp_replicate}: {strategy} does not replicate; use hsdp")
        if dims.batch != world and strategy == "hsdp":
            sizes = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
            raise ValueError(
                f"the mesh {dims} = {dims.batch} processes, but there are {world}: parallel.dp_shard must be one of "
                f"{sizes}, and dp_replicate is what is left, or start {dims.batch} processes (--nproc {dims.batch})"
            )
        if dims.batch != world:
            raise ValueError(
                f"the mesh {dims} = {dims.batch} processes, but there are {world}: "
                f"start {dims.batch} processes (--nproc {dims.batch}) "
                "or drop parallel.dp_replicate and parallel.dp_shard"
            )
        return dims


def _hsdp(dp_replicate: int | None, dp_shard: int | None, world: int) -> ParallelDims:
    """Both axes, where one may be left open."""
    if dp_replicate is None and dp_shard is None:
        raise ValueError(
            "hsdp needs parallel.dp_shard (processes that share one copy of the model, usually those of a node) or "
            "parallel.dp_replicate (copies)"
        )
    dp_replicate = dp_replicate or max(1, world // (dp_shard or 1))
    return ParallelDims(dp_replicate, dp_shard or max(1, world // dp_replicate))


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: samples = batch_ranks x accumulation x microbatch."""

    samples: int
    batch_ranks: int
    accumulation: int
    microbatch: int

    @staticmethod
    def resolve(global_batch_tokens: int, sequence_length: int, microbatch: int, batch_ranks: int) -> BatchPlan:
        """Raise ValueError with the arithmetic and the nearest sizes that fit when the batch does not divide."""
        at_once = sequence_length * microbatch * batch_ranks
        accumulation, rest = divmod(global_batch_tokens, at_once)
        if rest or not accumulation:
            below, above = accumulation * at_once, (accumulation + 1) * at_once
            nearest = f"{below} or {above}" if below else str(above)
            raise ValueError(
                f"train.global_batch_tokens = {global_batch_tokens} is not a multiple of sequence_length "
                f"{sequence_length} x microbatch_size {microbatch} x {batch_ranks} processes = {at_once}; "
                f"nearest: {nearest}, or change microbatch_size"
            )
        return BatchPlan(global_batch_tokens // sequence_length, batch_ranks, accumulation, microbatch)
