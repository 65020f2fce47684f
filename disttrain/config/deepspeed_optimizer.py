"""DeepSpeed's optimizer and scheduler in our words."""

from __future__ import annotations

from typing import Any

from disttrain.config.translation import Translation

DEFAULT_STEPS = 1000
NOT_DECAYED = "embeddings, norms and biases are not decayed (optim.groups changes that)"
_ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
_LION = {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0}
DEFAULTS = {"adam": _ADAM, "adamw": _ADAM, "lion": _LION}
"""DeepSpeed's own, where they are not ours: what its file leaves out is said in ours."""
WITHOUT = {
    "lamb": "scales each layer's step by its weights' norm",
    "muadam": "takes its rates from the widths of a mup model",
    "muadamw": "takes its rates from the widths of a mup model",
    "musgd": "takes its rates from the widths of a mup model",
    "onebitadam": "sends signs",
    "onebitlamb": "sends signs",
    "zerooneadam": "sends signs",
}
IMPLEMENTATION = ("torch_adam", "set_grad_none", "fused", "foreach", "capturable", "fp32_optimizer_states", "ns_method")
_PEAK = "scheduler.params.warmup_max_lr, which replaces optimizer.params.lr"
_ALL = {"name": "all", "match": [".*"]}


def translate_optimizer(t: Translation) -> None:
    """`scheduler` first: its largest rate replaces the optimizer's."""
    peak = _schedule(t)
    _optimizer(t, peak)
    if "train.steps" not in t.overrides and "train.tokens" not in t.overrides and "train.steps" not in t.settings:
        warmup = t.settings.get("schedule.warmup_steps", (0, ""))[0]
        steps = max(DEFAULT_STEPS, 10 * warmup)
        t.set("train.steps", steps, "not in the file: DeepSpeed leaves the end to the script; train.steps=N")


def _schedule(t: Translation) -> float | None:
    """Returns the peak rate where the scheduler says it."""
    kind = t.take("scheduler.type", str, "schedule.shape")
    if kind is None:
        _leave(t, "scheduler", "without scheduler.type DeepSpeed makes no scheduler")
        if "scheduler.type" not in t.left_open:
            t.set("schedule.shape", "constant", "no scheduler in the file; the script may have had its own")
            t.set("schedule.warmup_steps", 0, "the same")
        return None
    if kind not in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        t.note("scheduler.type", kind, "goes up and down again; `schedule.shape` has cosine, linear, wsd, inverse_sqrt")
        _leave(t, "scheduler.params", "of a scheduler that has no counterpart")
        return None
    return _warmup(t, kind)


def _warmup(t: Translation, kind: str) -> float | None:
    params = "scheduler.params"
    steps = t.take(f"{params}.warmup_num_steps", int, "schedule.warmup_steps")
    if f"{params}.warmup_num_steps" not in t.left_open:
        t.set("schedule.warmup_steps", 1000 if steps is None else steps, _origin(f"{params}.warmup_num_steps", steps))
    ramp = t.take(f"{params}.warmup_type", str)
    if ramp != "linear":
        default = "" if ramp else " (the default, not in the file)"
        t.note(f"{params}.warmup_type", ramp or "log", f"the rate rises linearly, not fast at first{default}")
    for key in ("warmup_min_lr", "warmup_min_ratio"):
        least = t.take(f"{params}.{key}", float)
        if least is not None:
            t.note(f"{params}.{key}", least, "the warm-up rises from 0")
    end = t.take(f"{params}.total_num_steps", int, "train.steps")
    shapes = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    t.set("schedule.shape", shapes[kind], f"scheduler.type {kind}; DeepSpeed's first two updates have the least rate")
    peak = t.take(f"{params}.warmup_max_lr", float, "optim.lr") if kind != "WarmupCosineLR" else None
    if kind == "WarmupLR":
        return peak
    if kind == "WarmupCosineLR":
        ratio = t.take(f"{params}.cos_min_ratio", float, "schedule.final_ratio")
        t.set("schedule.final_ratio", 1e-4 if ratio is None else ratio, _origin(f"{params}.cos_min_ratio", ratio))
    else:
        t.set("schedule.final_ratio", 0.0, "WarmupDecayLR ends at 0")
        peak = 1e-3 if peak is None and f"{params}.warmup_max_lr" not in t.left_open else peak
    if end is not None:
        own = {"train.steps", "train.tokens"} & t.overrides.keys() and t.overrides.get("train.steps") != end
        t.set("schedule.horizon_steps" if own else "train.steps", end, f"{params}.total_num_steps")
    return peak


def _optimizer(t: Translation, peak: float | None) -> None:
    kind = t.take("optimizer.type", str, "optim.preset")
    params = _params(t)
    if kind is None:
        if peak is not None:
            t.set("optim.lr", peak, _PEAK)
        if not params:
            return
        kind = "AdamW"
    if peak is not None:
        params["lr"] = peak
    _by_type(t, kind, params)
    for key in ("optim.lr", "optim.groups"):
        if peak is not None and key in t.settings:
            value, comment = t.settings[key]
            t.set(key, value, _PEAK if key == "optim.lr" else f"{comment}; {_PEAK}")


def _by_type(t: Translation, kind: str, params: dict[str, Any]) -> None:
    name = kind.lower()
    if name in WITHOUT:
        _without(t, kind, params)
    elif name == "muon":
        _muon(t, params)
    elif name in DEFAULTS:
        _preset(t, name, kind, params)
    elif name == "sgd":
        _sgd(t, params)
    else:
        _of_torch(t, "Adagrad" if name == "adagrad" else kind, params)


def _without(t: Translation, kind: str, params: dict[str, Any]) -> None:
    t.note("optimizer.type", kind, f"{WITHOUT[kind.lower()]}; there is none such; docs/optimizers.md has ours")
    for key, value in params.items():
        t.note(f"optimizer.params.{key}", value, "of an optimizer that has no counterpart")


def _params(t: Translation) -> dict[str, Any]:
    """What is said, without what only chooses an implementation."""
    params: dict[str, Any] = {}
    for key in t.section("optimizer.params"):
        name = key.rpartition("params.")[2]
        value = t.take(key, ours=f"optim.{name}" if name in _ADAM else "")
        if value is None:
            continue
        if name in IMPLEMENTATION:
            t.note(key, value, "torch's fused optimizers are used wherever they can be")
        elif name == "max_grad_norm":
            t.note(key, value, "gradient_clipping (optim.clip_norm) says it; DeepSpeed refuses it here")
        elif name in ("bias_correction", "amsgrad"):
            if value is not (name == "bias_correction"):
                t.note(key, value, "there is no such variant")
        else:
            params[name] = value
    return params


def _preset(t: Translation, name: str, kind: str, params: dict[str, Any]) -> None:
    decoupled = params.pop("adam_w_mode", True)
    preset = "adam" if name == "adam" and decoupled is False else "lion" if name == "lion" else "adamw"
    same = kind.lower() == preset
    t.set("optim.preset", preset, f"optimizer.type {kind}" + ("" if same else "; its decay is decoupled by default"))
    for key, default in DEFAULTS[name].items():
        value = params.pop(key, None)
        if f"optimizer.params.{key}" in t.left_open and value is None:
            continue
        comment = _origin(f"optimizer.params.{key}", value)
        if key == "weight_decay" and value:
            comment += f"; {NOT_DECAYED}"
        t.set(f"optim.{key}", default if value is None else value, comment)
    for key, value in params.items():
        t.note(f"optimizer.params.{key}", value, f"{preset} has no such setting")


def _sgd(t: Translation, params: dict[str, Any]) -> None:
    """torch's: momentum is a setting of ours only in a group."""
    momentum, nesterov = params.pop("momentum", 0.0), params.pop("nesterov", False)
    algorithm = ("nesterov" if nesterov else "momentum") if momentum else "sgd"
    settings = {"lr": params.pop("lr", 1e-3), "weight_decay": params.pop("weight_decay", 0.0)}
    group = _ALL | {"algorithm": algorithm} | settings | ({"momentum": momentum} if momentum else {})
    t.set("optim.groups", [group], "optimizer.type SGD and its params")
    for key, value in params.items():
        t.note(f"optimizer.params.{key}", value, f"{algorithm} has no such setting")


def _muon(t: Translation, params: dict[str, Any]) -> None:
    """DeepSpeed's splits by a mark on each parameter, ours by the model's plan."""
    params.pop("adam_w_mode", None)
    shared, decay = params.pop("lr", None), params.pop("weight_decay", 0.0)
    matrices = {"name": "matrices", "match": ["role:matrices"], "algorithm": "muon", "lr_scale": "original"}
    matrices |= {"lr": params.pop("muon_lr", shared or 0.02), "momentum": params.pop("momentum", 0.95)}
    adam = {"lr": params.pop("adam_lr", shared or 1e-3), "betas": params.pop("betas", [0.9, 0.999])}
    rest = {"name": "rest", "match": [".*"], "algorithm": "adamw", "eps": params.pop("eps", 1e-8), **adam}
    groups = [group | {"weight_decay": decay} for group in (matrices, rest)]
    t.set("optim.groups", groups, "optimizer.type Muon and its params; the hidden matrices, and adamw for the rest")
    for key, value in params.items():
        t.note(f"optimizer.params.{key}", value, "muon has no such setting")


def _of_torch(t: Translation, kind: str, params: dict[str, Any]) -> None:
    """Any class of torch.optim by its name, as DeepSpeed takes it."""
    group = _ALL | {"algorithm": f"torch.optim.{kind}", "lr": params.pop("lr", 1e-2 if kind == "Adagrad" else 1e-3)}
    group |= {"weight_decay": params.pop("weight_decay", 0.0), "arguments": params}
    t.set("optim.groups", [group], f"optimizer.type {kind}: the class of torch.optim, on shards")


def _origin(key: str, value: Any) -> str:
    return f"DeepSpeed's default of {key}" if value is None else key


def _leave(t: Translation, prefix: str, reason: str) -> None:
    for key in t.section(prefix):
        t.note(key, t.rest.pop(key), reason)
