"""What `accelerate launch` says of a run in its processes' environment, held against the config. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from disttrain.config.deepspeed import in_deepspeeds_words
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
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "FSDP_VERSION",
    "FSDP_OFFLOAD_PARAMS",
    "FSDP_RESHARD_AFTER_FORWARD",
    "FSDP_ACTIVATION_CHECKPOINTING",
)
"""Where its configuration file ends up."""
_OF_DEEPSPEED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_optimization.stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
}
"""What each is called in DeepSpeed's own file."""
_REMEDY = "make them equal, or take it out of accelerate's configuration"


def launcher_problems(config: RunConfig, said: Mapping[str, str], world: int) -> Iterator[str]:
    """Where what was `said` (`VARIABLES` that are set) is not what the config says, side by side.

    The native engine takes nothing of a launcher but its processes.
    """
    # "no" and "none" are what stands there where nobody has chosen, and 1 for accumulation.
    said = {name: value for name, value in said.items() if value.lower() not in ("no", "none")}
    if said.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == "1":
        del said["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]
    if config.engine == "deepspeed" and said.get("ACCELERATE_USE_DEEPSPEED") == "true":
        yield from _of_deepspeed(config, said, world)
    elif config.engine == "accelerate":
        yield from _of_accelerate(config, {name: value.lower() for name, value in said.items()}, world)


def _of_deepspeed(config: RunConfig, said: dict[str, str], world: int) -> Iterator[str]:
    ours = {name: words[key] for words in [in_deepspeeds_words(config, world)] for name, key in _OF_DEEPSPEED.items()}
    ours["ACCELERATE_MIXED_PRECISION"] = ("parallel.param_dtype", config.parallel.param_dtype)
    ours["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = ("deepspeed.config_file", config.deepspeed.config_file)
    for name, (setting, value) in ours.items():
        if name in said and said[name] not in (str(value), f"{value}.0"):
            yield f"{name} = {said[name]} from accelerate, {setting} is {value} here: {_REMEDY}"


def _of_accelerate(config: RunConfig, said: dict[str, str], world: int) -> Iterator[str]:
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
    if "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in said:
        count = str(len(rank_microbatches(config.train.batches(), config.train.microbatch_size, world)))
        ours["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = ("the number of microbatches of a process", count, count)
    for name, (setting, value, word) in ours.items():
        if name in said and said[name] != word:
            yield f"{name} = {said[name]} from accelerate, {setting} is {value} here: {_REMEDY}"


def _word(value: bool) -> str:
    return "true" if value else "false"
