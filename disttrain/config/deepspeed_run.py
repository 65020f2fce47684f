"""DeepSpeed's batch, ZeRO, precision, clipping and monitoring in our words."""

from __future__ import annotations

from disttrain.config.deepspeed_keys import ZERO
from disttrain.config.train import TrainConfig
from disttrain.config.translation import Translation

STRATEGIES = {
    0: ("ddp", "every process holds everything"),
    1: ("zero1", "weights are stored sharded too, and gathered once a step"),
    2: ("zero2", "weights are stored sharded too, and gathered once a step"),
    3: ("fsdp", "a block is gathered at a time"),
}
_OFFLOADS = ("offload_optimizer", "offload_param")
_DISK = {
    "offload_optimizer": ", under DeepSpeed too (docs/engines.md)",
    "offload_param": '; under engine = "deepspeed" deepspeed.offload_parameters and deepspeed.nvme_path keep the disk',
}
_DTYPES = {
    **{"fp32": "fp32", "float32": "fp32", "float": "fp32"},
    **{"bf16": "bf16", "bfp16": "bf16", "bfloat16": "bf16"},
    **{"fp16": "fp16", "float16": "fp16", "half": "fp16"},
}
_MICRO, _TRAIN, _STEPS = "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"
_AVERAGES = "every token counts alike: DeepSpeed averages the means of microbatches and ranks"


def translate_run(t: Translation) -> None:
    """Everything but optimizer and schedule."""
    _batch(t)
    _strategy(t)
    _offload(t)
    _precision(t)
    clip = t.take("gradient_clipping", float, "optim.clip_norm")
    if clip is not None:
        t.set("optim.clip_norm", clip, "gradient_clipping")
    _activation_checkpointing(t)
    _monitor(t)


def _batch(t: Translation) -> None:
    batch, micro, accumulation = (
        t.take(key, int, ours)
        for key, ours in (
            (_TRAIN, "train.global_batch_tokens"),
            (_MICRO, "train.microbatch_size"),
            (_STEPS, "train.global_batch_tokens"),
        )
    )
    given = ((_TRAIN, batch), (_MICRO, micro), (_STEPS, accumulation), ("--world", t.world))
    if bad := [f"{key} = {value}: must be above 0" for key, value in given if value is not None and value < 1]:
        t.problems += bad
        return
    if accumulation is not None:
        t.note(_STEPS, accumulation, "follows from global batch, microbatch_size and the number of processes")
    world = t.world or _world(batch, micro, accumulation)
    if batch and micro and world:
        steps = accumulation or max(1, batch // (micro * world))
        if batch != micro * steps * world:
            t.problems.append(
                f"{_TRAIN} = {batch} is not {_MICRO} {micro} x {_STEPS} {steps} x {world} processes = "
                f"{micro * steps * world}; correct one of them, or --world"
            )
    if micro is None and batch and world:
        micro = max(1, batch // world // (accumulation or 1))
    if micro is not None:
        t.set("train.microbatch_size", micro, f"{_MICRO}; sequences that a process computes at once, at most")
    _global_batch(t, batch, micro, accumulation or 1)


def _world(batch: int | None, micro: int | None, accumulation: int | None) -> int | None:
    """The number of processes, where all three numbers say it."""
    if batch and micro and accumulation and batch % (micro * accumulation) == 0:
        return batch // (micro * accumulation)
    return None


def _global_batch(t: Translation, batch: int | None, micro: int | None, accumulation: int) -> None:
    length = t.overrides.get("train.sequence_length", TrainConfig.model_fields["sequence_length"].default)
    said = "" if "train.sequence_length" in t.overrides else ", which DeepSpeed does not know: train.sequence_length=N"
    if "train.global_batch_tokens" in t.overrides or (batch is None and micro is None):
        return
    if batch is None and t.world is None:
        t.problems.append(
            f"the global batch is {_MICRO} {micro} x {_STEPS} {accumulation} x processes, and nothing says how many: "
            "give --world N"
        )
        return
    product = f"{_TRAIN} {batch}"
    if batch is None:
        batch = (micro or 1) * accumulation * (t.world or 1)
        product = f"{micro} x {accumulation} x {t.world} processes"
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        t.problems.append(f"override train.sequence_length = {length!r}: must be a whole number above 0")
        return
    t.set("train.global_batch_tokens", batch * length, f"{product} x sequence_length {length}{said}; {_AVERAGES}")


def _strategy(t: Translation) -> None:
    whole = t.rest.get(ZERO)
    if isinstance(whole, bool):  # the oldest form: stage 1 or none
        t.take(ZERO)
        stage = int(whole)
    else:
        stage = t.take(f"{ZERO}.stage", int, "parallel.strategy") or 0
    if stage not in STRATEGIES:
        t.problems.append(f"{ZERO}.stage = {stage}: must be one of 0, 1, 2, 3")
        return
    strategy, meaning = STRATEGIES[stage]
    t.set("parallel.strategy", strategy, f"{ZERO}.stage {stage}; {meaning}")


def _offload(t: Translation) -> None:
    """One switch for what DeepSpeed has two; only sharded weights and states can go."""
    devices = {name: t.take(f"{ZERO}.{name}.device", str, "parallel.cpu_offload") for name in _OFFLOADS}
    for old, name in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if t.take(f"{ZERO}.{old}", bool):
            devices[name] = "cpu"
    for name, device in devices.items():
        if device in (None, "none"):
            continue
        if device not in ("cpu", "nvme"):
            t.problems.append(f"{ZERO}.{name}.device = {device!r}: must be one of none, cpu, nvme")
        elif t.settings.get("parallel.strategy", ("ddp",))[0] == "ddp":
            t.note(f"{ZERO}.{name}.device", device, "without a stage nothing is sharded, so nothing is moved")
        else:
            nvme = ", which is as far as they go: not to NVMe" if device == "nvme" else ""
            t.set(
                "parallel.cpu_offload",
                True,
                f"{name}.device = {device}; weights, gradients and optimizer state together go to host memory{nvme}",
            )
            if device == "nvme":
                t.note(
                    f"{ZERO}.{name}.device", device, f"host memory (parallel.cpu_offload) takes its place{_DISK[name]}"
                )


def _precision(t: Translation) -> None:
    ours = "parallel.param_dtype"
    old = t.take("bfloat16.enabled", bool, ours)
    enabled = {"bf16": t.take("bf16.enabled", bool, ours) or old, "fp16": t.take("fp16.enabled", bool, ours)}
    chosen = [dtype for dtype, on in enabled.items() if on]
    if len(chosen) == 2:
        t.problems.append("bf16.enabled and fp16.enabled are both true; leave one of them")
        return
    origin = f"{chosen[0]}.enabled" if chosen else ""
    autocast, dtype = t.take("torch_autocast.enabled", bool, ours), t.take("torch_autocast.dtype", str, ours)
    if autocast and not chosen:
        chosen = [_dtype(t, "torch_autocast.dtype", dtype or "bfloat16")]
        origin = f"torch_autocast.dtype {dtype}, which chose by operation; here all weights are cast"
    travel = t.take("communication_data_type", str, "parallel.reduce_dtype")
    if not chosen:
        if travel not in (None, "fp32"):
            t.note("communication_data_type", travel, "weights compute in fp32, and gradients travel in that")
        return
    if chosen[0] != "fp32":
        t.set(ours, chosen[0], f"{origin}; the weights that the optimizer sees stay fp32")
        reduce = _dtype(t, "communication_data_type", travel or chosen[0])
        if reduce not in ("fp32", chosen[0]):
            t.note("communication_data_type", travel, f"gradients travel in fp32 or in {chosen[0]}")
            reduce = "fp32"
        why = "communication_data_type" if travel else f"DeepSpeed's default in {chosen[0]}; fp32 would sum exactly"
        t.set("parallel.reduce_dtype", reduce, why)


def _dtype(t: Translation, key: str, said: str) -> str:
    found = _DTYPES.get(said.lower().removeprefix("torch."))
    if found is None:
        t.problems.append(f"{key} = {said!r}: must be one of fp32, bf16, fp16")
    return found or "fp32"


def _activation_checkpointing(t: Translation) -> None:
    """DeepSpeed's section only says how; the model's code decides whether, so a section in use counts as a yes."""
    section = "activation_checkpointing"
    switches = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "number_checkpoints")
    if any(t.rest.get(f"{section}.{switch}") for switch in switches):
        t.set(
            "parallel.activation_checkpointing",
            "full",
            f"{section}: DeepSpeed recomputes what the model's code asks for, this every block",
        )


def _monitor(t: Translation) -> None:
    steps = t.take("steps_per_print", int, "monitor.log_every")
    if steps is not None and steps < 1:
        t.problems.append(f"steps_per_print = {steps}: must be above 0")
    elif steps is not None:
        t.set("monitor.log_every", steps, "steps_per_print; metrics.jsonl has the same steps")
    if t.take("tensorboard.enabled", bool, "monitor.tensorboard.enabled"):
        t.set("monitor.tensorboard.enabled", True, "tensorboard.enabled")
    if t.take("wandb.enabled", bool, "monitor.wandb.mode"):
        t.set("monitor.wandb.mode", "online", "wandb.enabled; offline where the server cannot be reached")
    for theirs, ours in (("project", "project"), ("team", "entity"), ("group", "group")):
        if (value := t.take(f"wandb.{theirs}", str, f"monitor.wandb.{ours}")) is not None:
            t.set(f"monitor.wandb.{ours}", value, f"wandb.{theirs}")
    _profile(t)


def _profile(t: Translation) -> None:
    step = t.take("flops_profiler.profile_step", int, "profile.steps")
    if t.take("flops_profiler.enabled", bool, "profile.steps"):
        step = step or 1
        t.set("profile.steps", [step, step], "flops_profiler.enabled, flops_profiler.profile_step; of every rank")
    elif step is not None:
        t.note("flops_profiler.profile_step", step, "the profiler is not enabled")
