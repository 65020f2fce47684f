"""What `accelerate launch` says of a run in its processes' environment, held against the config. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from disttrain.config.layout import rank_microbatches
from disttrain.config.run import RunConfig

VARIABLES = (
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "FSDP_VERSION",
    "FSDP_OFFLOAD_PARAMS",
    "FSDP_RESHARD_AFTER_FORWARD",
    "FSDP_ACTIVATION_CHECKPOINTING",
)
"""Where its configuration file ends up."""
_REMEDY = "make them equal, or take it out of accelerate's configuration"


def launcher_problems(config: RunConfig, said: Mapping[str, str], world: int) -> Iterator[str]:
    """Where what was `said` (`VARIABLES` that are set) is not what the config says, side by side."""
    # "no" is what stands there where nobody has chosen.
    said = {name: value.lower() for name, value in said.items() if value.lower() != "no"}
    if said.get("ACCELERATE_USE_DEEPSPEED") == "true":
        yield "accelerate's configuration asks for DeepSpeed: set engine = 'deepspeed', which it starts alike"
    for name in ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if said.get(name) == "true":
            yield f"accelerate's configuration sets {name}: under this engine the layout is [parallel]'s; take it out"
    if "ACCELERATE_DYNAMO_BACKEND" in said:
        yield "accelerate's configuration has a dynamo_backend: set parallel.compile = true, and take it out there"
    yield from _differences(config, said, world)


def _differences(config: RunConfig, said: Mapping[str, str], world: int) -> Iterator[str]:
    parallel = config.parallel
    sharded = said.get("ACCELERATE_USE_FSDP") == "true"
    ours: dict[str, tuple[str, str, str]] = {
        "ACCELERATE_MIXED_PRECISION": ("parallel.param_dtype", parallel.param_dtype, parallel.param_dtype),
        "ACCELERATE_USE_FSDP": ("parallel.strategy", parallel.strategy, _word(parallel.shards)),
    }
    if sharded:
        keeps = parallel.reshard_after_forward is not False
        recomputes = parallel.activation_checkpointing != "none"
        ours |= {
            "FSDP_VERSION": ("FSDP's version", "2", "2"),
            "FSDP_OFFLOAD_PARAMS": ("parallel.cpu_offload", _word(parallel.cpu_offload), _word(parallel.cpu_offload)),
            "FSDP_RESHARD_AFTER_FORWARD": ("parallel.reshard_after_forward", _word(keeps), _word(keeps)),
            "FSDP_ACTIVATION_CHECKPOINTING": (
                "parallel.activation_checkpointing",
                parallel.activation_checkpointing,
                _word(recomputes),
            ),
        }
    # Accelerate writes 1 where nobody has asked for any.
    if said.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        count = str(len(rank_microbatches(config.train.batches(), config.train.microbatch_size, world)))
        ours["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = ("the number of microbatches of a process", count, count)
    for name, (setting, value, word) in ours.items():
        if name in said and said[name] != word:
            yield f"{name} = {said[name]} from accelerate, {setting} is {value} here: {_REMEDY}"


def _word(value: bool) -> str:
    return "true" if value else "false"
