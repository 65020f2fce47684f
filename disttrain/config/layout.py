"""The mesh and batch arithmetic: pure, printable, with the products in every refusal."""

from __future__ import annotations

from dataclasses import dataclass

from disttrain.schedule import BatchSchedule


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


def check_batches(batches: BatchSchedule, batch_ranks: int) -> None:
    """ValueError with the arithmetic and the nearest sizes where a batch does not divide over `batch_ranks`."""
    for stage in batches.stages:
        if stage.samples % batch_ranks == 0:
            continue
        length = batches.sequence_length
        tokens, at_once = stage.samples * length, length * batch_ranks
        below = tokens // at_once * at_once
        nearest = f"{below} or {below + at_once}" if below else str(at_once)
        single = len(batches.stages) == 1
        what = (
            "train.global_batch_tokens" if single else f"train.batch_ramp: the batch from token {stage.from_tokens} on"
        )
        raise ValueError(
            f"{what} = {tokens} is not a multiple of sequence_length {length} x {batch_ranks} processes = {at_once}; "
            f"nearest: {nearest}"
        )


def microbatch_sizes(rank_samples: int, most: int) -> list[int]:
    """The fewest microbatches of at most `most` samples, as equal as they can be."""
    count = -(-rank_samples // most)
    return [rank_samples // count + (index < rank_samples % count) for index in range(count)]


def rank_microbatches(batches: BatchSchedule, most: int, batch_ranks: int) -> list[int]:
    """`microbatch_sizes` of one of `batch_ranks` processes, in the largest batch of the run."""
    samples = max(stage.samples for stage in batches.stages) // batch_ranks
    return microbatch_sizes(max(samples, 1), most)
