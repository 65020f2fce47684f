"""A run's config in DeepSpeed's words, together with what a user's own file says. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from disttrain.config.clipping import Clip, ClipNorm, NoClip
from disttrain.config.deepspeed_file import read_object
from disttrain.config.deepspeed_nvme import disk_settings
from disttrain.config.engines import STAGES
from disttrain.config.layout import rank_microbatches
from disttrain.config.run import RunConfig
from disttrain.errors import UserError

AUTO = "auto"
"""What other frameworks let a file say where they fill in a value."""
NEVER = 10**12
"""Elements or steps that nothing reaches."""
_PASSED_ON = {
    "aio",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "steps_per_print",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_partitions",
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_param.pin_memory",
    "zero_optimization.offload_param.buffer_count",
    "zero_optimization.offload_param.buffer_size",
    "zero_optimization.offload_param.max_in_cpu",
    "zero_optimization.prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold",
    "zero_optimization.model_persistence_threshold",
    "zero_optimization.max_live_parameters",
    "zero_optimization.max_reuse_distance",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
}
"""What decides about speed and memory only, or about what is told."""
_REUSE = ("zero_optimization.stage3_max_reuse_distance", "zero_optimization.max_reuse_distance")
_PART = "zero_optimization.sub_group_size"
_FILLED_IN = {
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.gather_16bit_weights_on_model_save",
    "bf16.enabled",
    "fp16.enabled",
    "fp16.auto_cast",
    "fp16.initial_scale_power",
    "fp16.loss_scale_window",
    "fp16.hysteresis",
    "fp16.min_loss_scale",
    "optimizer.params.torch_adam",
    "optimizer.params.adam_w_mode",
}
"""What may be there and is decided here: the loss scale is ours, the state is in our checkpoints."""


def ds_config(config: RunConfig, world: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given, and what lies in the run folder as ds_config.json.

    Raises UserError for a `deepspeed.config_file` that cannot be read or says otherwise, with all differences.
    """
    if problems := list(file_problems(config, world)):
        raise UserError(problems)
    parallel, micro, count = config.parallel, *_microbatches(config, world)
    stage = STAGES[parallel.strategy]
    translated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": count,
        # Clipped by our rules, before the update.
        "gradient_clipping": 0.0,
        "communication_data_type": parallel.reduce_dtype,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "zero_optimization": _zero(config, stage, world),
    }
    if stage and parallel.param_dtype != "fp32":
        translated["data_types"] = {"grad_accum_dtype": "fp32"}
        # The loss comes scaled already.
        scale = {"loss_scale": 1.0} if parallel.param_dtype == "fp16" else {}
        translated[parallel.param_dtype] = {"enabled": True, **scale}
    passed_on = {key: value for key, value in _file_items(config) if key in _passed_on(config) and value != AUTO}
    return _with_items(translated, passed_on)


def _zero(config: RunConfig, stage: int, world: int) -> dict[str, Any]:
    section = config.deepspeed
    zero: dict[str, Any] = {"stage": stage}
    if section.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": section.offload_optimizer}
    if stage in (1, 2):
        # Our clipping sums the same norm; where DeepSpeed's own cannot be left out it is a second one.
        own_norm = section.offload_optimizer != "none" or (stage == 1 and config.parallel.param_dtype == "bf16")
        zero["compute_grad_norm"] = own_norm
    if stage == 3:
        # One call of the optimizer for all parameters: clipping has to see all gradients together.
        zero["sub_group_size"] = NEVER
        if section.offload_parameters == "cpu":
            zero["offload_param"] = {"device": "cpu"}
        elif section.offload_parameters == "nvme":
            zero |= disk_settings(config, world)
    return zero


def _passed_on(config: RunConfig) -> set[str]:
    return (_PASSED_ON - set(_REUSE)) | {_PART} if config.deepspeed.offload_parameters == "nvme" else _PASSED_ON


def _microbatches(config: RunConfig, world: int) -> tuple[int, int]:
    """Rows and number of the microbatches of a process."""
    sizes = rank_microbatches(config.train.batches(), config.train.microbatch_size, config.dims(world).batch)
    return max(sizes), len(sizes)


def file_problems(config: RunConfig, world: int) -> Iterator[str]:
    """Where `deepspeed.config_file` says something else than the config, side by side, or what it must not say."""
    try:
        items = dict(_file_items(config))
    except UserError as error:
        yield from error.problems
        return
    ours, file = in_deepspeeds_words(config, world), config.deepspeed.config_file
    if str(items.get("optimizer.type")).lower() == "adam" and items.get("optimizer.params.adam_w_mode", True):
        items["optimizer.type"] = "AdamW"  # DeepSpeed's Adam decays so unless it is told otherwise
    for key, value in items.items():
        if key in _passed_on(config) | _FILLED_IN or value == AUTO:
            continue
        if key not in ours:
            yield f"{file}: {key} = {value!r}: {_why_not(key)}"
            continue
        setting, here = ours[key]
        if not _same(value, here):
            yield f"{file}: {key} is {value!r} there, {setting} is {here!r} here: make them equal, or take it out there"
    for dtype in ("bf16", "fp16"):
        said, here = items.get(f"{dtype}.enabled"), config.parallel.param_dtype
        if isinstance(said, bool) and said != (here == dtype):
            yield (
                f"{file}: {dtype}.enabled is {str(said).lower()} there, parallel.param_dtype is {here!r} here: make "
                "them equal, or take it out there"
            )


def in_deepspeeds_words(config: RunConfig, world: int) -> dict[str, tuple[str, Any]]:
    """What a file may repeat, by DeepSpeed's dotted keys: our setting and its value in DeepSpeed's words."""
    micro, count = _microbatches(config, world)
    section, groups = config.deepspeed, config.optim.resolved_groups
    first = groups[0]
    known: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": ("the rows of a microbatch (train.microbatch_size)", micro),
        "gradient_accumulation_steps": ("the number of microbatches of a process", count),
        "train_batch_size": (
            "train.global_batch_tokens / train.sequence_length",
            config.train.global_batch_tokens // config.train.sequence_length,
        ),
        "gradient_clipping": ("optim.clip_norm", _clip_norm([group.clip for group in groups])),
        "communication_data_type": ("parallel.reduce_dtype", config.parallel.reduce_dtype),
        "zero_optimization.stage": ("the stage of parallel.strategy", STAGES[config.parallel.strategy]),
        "zero_optimization.offload_optimizer.device": ("deepspeed.offload_optimizer", section.offload_optimizer),
        "zero_optimization.offload_param.device": ("deepspeed.offload_parameters", section.offload_parameters),
        "zero_optimization.offload_param.nvme_path": ("deepspeed.nvme_path", section.nvme_path),
        **dict.fromkeys(_REUSE, ("what parameters that are read from a disk have", 0)),
        "fp16.loss_scale": ("the loss scale, which follows the gradients,", 0),
        "data_types.grad_accum_dtype": ("the type that gradients are summed in", "fp32"),
        "optimizer.type": ("the algorithm of group " + first.name, first.algorithm),
        "optimizer.params.weight_decay": ("optim.weight_decay", max(group.weight_decay for group in groups)),
    }
    for key in ("lr", "betas", "eps"):
        if hasattr(first, key):
            known[f"optimizer.params.{key}"] = (f"optim.{key}", getattr(first, key))
    return known


def _clip_norm(clips: Sequence[Clip | None]) -> float | str:
    """DeepSpeed has one limit for the norm of all gradients, or none."""
    first = clips[0]
    if all(clip is None or isinstance(clip, NoClip) for clip in clips):
        return 0.0
    if not isinstance(first, ClipNorm) or first.order != 2 or any(clip != first for clip in clips):
        return "by other rules"
    return first.limit if first.over == "all" or len(clips) == 1 else "by group"


def _why_not(key: str) -> str:
    if key.startswith("scheduler."):
        return "the rate follows [schedule], which is not read from there; take the scheduler out"
    if key.startswith("activation_checkpointing"):
        return "set parallel.activation_checkpointing, and take it out"
    if key.partition(".")[0] in ("tensorboard", "wandb", "csv_monitor", "comet"):
        return "a run is shown by [monitor]; take it out"
    return "has no counterpart in a run of disttrain, or would change where its parameters lie; take it out"


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    if isinstance(theirs, list | tuple) and isinstance(ours, tuple):
        return list(theirs) == list(ours)
    return bool(theirs == ours)


def _file_items(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of the user's file. Raises UserError where it is none."""
    name = config.deepspeed.config_file
    if name is None:
        return
    table = read_object(Path(name).expanduser(), f"deepspeed.config_file = {name}")
    yield from _flattened(table)


def _flattened(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and prefix + key not in _PASSED_ON:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _with_items(table: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """`table` with values at dotted keys, for tables that there are."""
    for key, value in items.items():
        *way, last = key.split(".")
        place = table
        for part in way:
            place = place.setdefault(part, {})
        place[last] = value
    return table
