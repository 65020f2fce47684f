"""DeepSpeed's JSON in our words: nothing dropped, everything accepted, bad files refused in words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from disttrain.config import RunConfig, load_config
from disttrain.config.deepspeed_keys import NO_COUNTERPART, why_not
from disttrain.config.from_deepspeed import from_deepspeed
from disttrain.config.load import valid_keys
from disttrain.errors import UserError

EVERYTHING: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "steps_per_print": 20,
    "communication_data_type": "fp32",
    "wall_clock_breakdown": False,
    "prescale_gradients": True,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": 5e8,
        "stage3_param_persistence_threshold": 1e5,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch", "pin_memory": True},
        "offload_param": {"device": "none"},
        "zero_hpz_partition_size": 8,
        "made_up": 1,
    },
    "bf16": {"enabled": True, "check_grad_overflow": True},
    "fp16": {"enabled": False, "loss_scale_window": 500},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    "optimizer": {"type": "AdamW", "params": {"lr": 6e-4, "betas": [0.9, 0.95], "torch_adam": True, "amsgrad": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 500, "warmup_num_steps": 50, "warmup_max_lr": 2e-4, "warmup_min_lr": 1e-6},
    },
    "activation_checkpointing": {"partition_activations": True, "number_checkpoints": None},
    "tensorboard": {"enabled": True, "output_path": "/tb"},
    "wandb": {"enabled": True, "project": "pile", "team": "us"},
    "csv_monitor": {"enabled": False},
    "flops_profiler": {"enabled": True, "profile_step": 7, "top_modules": 1},
    "aio": {"block_size": 1048576},
    "data_types": {"grad_accum_dtype": "fp32"},
    "elasticity": {},
    "zero_optimisation": {"stage": 2},
}


COSINE = ("cosine", 9, 1e-4, None)


def write(folder: Path, table: object) -> Path:
    file = folder / "ds.json"
    file.write_text(table if isinstance(table, str) else json.dumps(table))
    return file


def translated(folder: Path, table: object, world: int | None = None, **overrides: Any) -> tuple[RunConfig, str]:
    """The config as `disttrain config` would read the printed text, and the text."""
    text = from_deepspeed(write(folder, table), {k.replace("__", "."): v for k, v in overrides.items()}, world)
    toml = folder / "translated.toml"
    toml.write_text(text)
    return load_config(toml, []).config, text


def refused(folder: Path, table: object, world: int | None = None) -> list[str]:
    with pytest.raises(UserError) as error:
        from_deepspeed(write(folder, table), {}, world)
    return [problem.replace(f"{folder}/", "") for problem in error.value.problems]


def leaves(table: dict[str, Any], prefix: str = "") -> list[str]:
    nested = ((key, value) for key, value in table.items() if isinstance(value, dict) and value)
    own = [prefix + key for key, value in table.items() if not (isinstance(value, dict) and value)]
    return own + [leaf for key, value in nested for leaf in leaves(value, f"{prefix}{key}.")]


def test_every_key_becomes_one_of_ours_or_is_named(tmp_path: Path) -> None:
    config, text = translated(tmp_path, EVERYTHING, train__sequence_length=1024)
    assert config.train.global_batch_tokens == 64 * 1024
    assert (config.train.microbatch_size, config.train.steps, config.train.sequence_length) == (4, 500, 1024)
    parallel = config.parallel
    assert (parallel.strategy, parallel.param_dtype, parallel.reduce_dtype) == ("fsdp", "bf16", "fp32")
    assert parallel.cpu_offload
    assert parallel.activation_checkpointing == "full"
    optim = config.optim
    assert (optim.preset, optim.lr, optim.betas, optim.eps, optim.weight_decay) == ("adamw", 2e-4, (0.9, 0.95), 1e-8, 0)
    assert optim.clip_norm == 0.5
    schedule = config.schedule
    assert (schedule.shape, schedule.warmup_steps, schedule.final_ratio) == ("linear", 50, 0)
    assert (config.monitor.log_every, config.profile.steps) == (20, (7, 7))
    assert (config.monitor.wandb.mode, config.monitor.wandb.entity) == ("online", "us")
    comments = "\n".join(line.partition("#")[2] for line in text.splitlines())
    assert {leaf for leaf in leaves(EVERYTHING) if ".".join(leaf.split(".")[-2:]) not in comments} == set()


def test_parameters_on_a_disk(tmp_path: Path) -> None:
    """Our own engine keeps none there, and says which does."""
    offload = {"device": "nvme", "nvme_path": "/scratch"}
    table = {"train_batch_size": 8, "zero_optimization": {"stage": 3, "offload_param": offload}}
    config, text = translated(tmp_path, table)
    assert config.parallel.cpu_offload
    [device, path] = [line for line in text.splitlines() if line.startswith("# zero_optimization.offload_param.")]
    assert "device" in device
    assert "deepspeed.offload_parameters" in device
    assert path == (
        '# zero_optimization.offload_param.nvme_path = "/scratch": under engine = "deepspeed" it is deepspeed.nvme_path'
    )


def test_what_is_unknown_is_named_with_the_nearest(tmp_path: Path) -> None:
    _, text = translated(tmp_path, EVERYTHING)
    assert (
        "# zero_optimisation.stage = 2: DeepSpeed 0.19 has no such key; did you mean zero_optimization.stage?" in text
    )
    assert "# zero_optimization.made_up = 1: DeepSpeed 0.19 has no such key" in text


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [(0, "ddp"), (1, "zero1"), (2, "zero2"), (3, "fsdp"), (True, "zero1"), (False, "ddp"), (None, "ddp")],
)
def test_stages(tmp_path: Path, stage: int | bool | None, strategy: str) -> None:
    zero = stage if isinstance(stage, bool) else {"stage": stage}
    config, _ = translated(tmp_path, {"train_batch_size": 8, "zero_optimization": zero})
    assert config.parallel.strategy == strategy


@pytest.mark.parametrize(
    ("said", "world", "batch", "micro"),
    [
        ({"train_batch_size": 64}, None, 64, 4),
        ({"train_batch_size": 64}, 8, 64, 8),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 2}, 8, 64, 4),
        ({"train_micro_batch_size_per_gpu": 2}, 8, 16, 2),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 8, 48, 2),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2}, None, 64, 2),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, None, 16, 4),
    ],
)
def test_batch_arithmetic(tmp_path: Path, said: dict[str, Any], world: int | None, batch: int, micro: int) -> None:
    """What DeepSpeed makes of one or two of the three numbers; `auto` leaves our defaults."""
    config, _ = translated(tmp_path, said, world)
    assert (config.train.global_batch_tokens, config.train.microbatch_size) == (256 * batch, micro)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"type": "Adam"}, ("adamw", {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0})),
        ({"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}, ("adam", {"weight_decay": 0.1})),
        ({"type": "Lion", "params": {"lr": 1e-4}}, ("lion", {"lr": 1e-4, "betas": (0.9, 0.999)})),
        ({"type": "SGD", "params": {"lr": 0.1}}, ("sgd", {"lr": 0.1, "weight_decay": 0.0})),
        ({"type": "SGD", "params": {"momentum": 0.8, "nesterov": True}}, ("nesterov", {"momentum": 0.8})),
        ({"type": "Adagrad", "params": {"eps": 1e-9}}, ("torch.optim.Adagrad", {"arguments": {"eps": 1e-9}})),
        ({"type": "NAdam", "params": {"lr": 0.01}}, ("torch.optim.NAdam", {"lr": 0.01})),
        (
            {"type": "Muon", "params": {"muon_lr": 0.05, "lr": 1e-3}},
            ("muon", {"lr": 0.05, "lr_scale": "original"}),
        ),
    ],
)
def test_optimizers(tmp_path: Path, optimizer: dict[str, Any], expected: tuple[str, dict[str, Any]]) -> None:
    config, _ = translated(tmp_path, {"train_batch_size": 8, "optimizer": optimizer})
    group = config.optim.resolved_groups[0 if expected[0] == "muon" else -1]
    assert group.algorithm == expected[0]
    assert {key: getattr(group, key) for key in expected[1]} == expected[1]


def test_an_optimizer_without_counterpart_is_named_and_ours_left_alone(tmp_path: Path) -> None:
    config, text = translated(tmp_path, {"optimizer": {"type": "Lamb", "params": {"lr": 1e-2, "max_coeff": 9}}})
    assert config.optim.lr is None
    assert '# optimizer.type = "Lamb":' in text
    assert "# optimizer.params.max_coeff = 9:" in text


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 3e-4}}, ("constant", 1000, None, 3e-4)),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": 9000}}, ("linear", 1000, 0.0, 1e-3)),
        (
            {"type": "WarmupCosineLR", "params": {"total_num_steps": 90, "warmup_num_steps": 9}},
            ("cosine", 9, 1e-4, None),
        ),
        ({"type": "OneCycle", "params": {"cycle_max_lr": 1}}, (None, None, None, None)),
        (None, ("constant", 0, None, None)),
    ],
)
def test_schedules(tmp_path: Path, scheduler: dict[str, Any] | None, expected: tuple[object, ...]) -> None:
    config, _ = translated(tmp_path, {"train_batch_size": 8, **({"scheduler": scheduler} if scheduler else {})})
    schedule = config.schedule
    assert (schedule.shape, schedule.warmup_steps, schedule.final_ratio, config.optim.lr) == expected
    total = (scheduler or {"params": {}})["params"].get("total_num_steps")
    assert config.train.steps == (total or (10_000 if schedule.warmup_steps == 1000 else 1000))


def test_auto_leaves_our_default_and_says_so(tmp_path: Path) -> None:
    table = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}, "gradient_clipping": "auto"}
    config, text = translated(tmp_path, table)
    assert config.optim.lr is None
    assert config.optim.betas is None
    assert text.count('= "auto": filled in by the script') == 3


def test_overrides_win(tmp_path: Path) -> None:
    config, _ = translated(tmp_path, EVERYTHING, train__tokens=10**6, train__global_batch_tokens=512, optim__lr=1.0)
    assert (config.train.tokens, config.train.steps, config.train.global_batch_tokens) == (10**6, None, 512)
    assert config.schedule.horizon_steps == 500
    assert config.optim.lr == 1.0


@pytest.mark.parametrize(
    ("table", "world", "words"),
    [
        ('{"a": 1,}', None, "ds.json:1: not valid JSON"),
        ('{"a": 1, "a": 2}', None, "ds.json: a is given twice"),
        ("[1]", None, "ds.json: holds a list"),
        ({"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4}, 8, "is not train_micro_batch_size_per_gpu 4 x"),
        ({"train_micro_batch_size_per_gpu": 4}, None, "give --world N"),
        ({"train_batch_size": "many"}, None, "train_batch_size = 'many': must be a whole number"),
        ({"train_batch_size": -1}, None, "train_batch_size = -1: must be above 0"),
        ({"zero_optimization": {"stage": 4}}, None, "zero_optimization.stage = 4: must be one of 0, 1, 2, 3"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, None, "both true"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": -1}}}, None, "its translation is refused: optim.lr"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, None]}}}, None, "refused: optim.betas.1"),
        ({"optimizer": {"type": "a\nb", "params": {"lr": 1}}}, None, "refused: optim.groups.0.custom.algorithm"),
        ({"optimizer": "AdamW"}, None, "optimizer = 'AdamW': must be an object of settings"),
        ({"bf16": True}, None, "bf16 = True: must be an object of settings"),
        (
            {"bf16": {"enabled": True}, "communication_data_type": "fp64"},
            None,
            "'fp64': must be one of fp32, bf16, fp16",
        ),
        ('{"gradient_clipping": NaN}', None, "refused: optim.clip_norm: Input should be a finite number"),
        ('{"gradient_clipping": 1e999}', None, "refused: optim.clip_norm: Input should be a finite number"),
        ('{"wandb": {"project": "\\ud83d"}}', None, "half of a character"),
        ("[" * 100_000, None, "nested too deep"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "disk"}}}, None, "one of none, cpu, nvme"),
    ],
)
def test_bad_files_are_refused_in_words(tmp_path: Path, table: object, world: int | None, words: str) -> None:
    problems = refused(tmp_path, table, world)
    assert len(problems) == 1
    assert words in problems[0]


def test_odd_text_stays_where_it_is(tmp_path: Path) -> None:
    """What would end a comment or a string, or is no character of TOML's escapes, in keys and in values."""
    table = {
        "x\nsteps = 5": 1,
        "scheduler": {"type": "A\n[train]\nsteps = 7"},
        "wandb": {"project": "\U0001f600\x7f\\"},
    }
    config, text = translated(tmp_path, table)
    assert config.train.steps == 1000
    assert config.monitor.wandb.project == "\U0001f600\x7f\\"
    assert "# x\\nsteps = 5 = 1: DeepSpeed 0.19 has no such key" in text


def test_types_by_torchs_names(tmp_path: Path) -> None:
    config, _ = translated(tmp_path, {"torch_autocast": {"enabled": True, "dtype": "torch.float16"}})
    assert (config.parallel.param_dtype, config.parallel.reduce_dtype) == ("fp16", "fp16")


def test_a_scheduler_without_a_type_is_none(tmp_path: Path) -> None:
    config, text = translated(tmp_path, {"scheduler": {"params": {"warmup_num_steps": 10}}})
    assert (config.schedule.shape, config.schedule.warmup_steps) == ("constant", 0)
    assert "# scheduler.params.warmup_num_steps = 10: without scheduler.type DeepSpeed makes no scheduler" in text


def test_all_problems_at_once(tmp_path: Path) -> None:
    assert (
        len(refused(tmp_path, {"train_batch_size": 0, "zero_optimization": {"stage": 9}, "gradient_clipping": "x"}))
        == 3
    )


def test_the_table_knows_deepspeeds_own_keys() -> None:
    """Against the installed package: every key of its sections is one that we translate or explain."""
    constants = pytest.importorskip("deepspeed.runtime.zero.config")
    fields = constants.DeepSpeedZeroConfig.model_fields
    keys = {f"zero_optimization.{field.alias or name}" for name, field in fields.items()}
    dealt_with = {f"zero_optimization.{key}" for key in ("stage", "cpu_offload", "cpu_offload_param")}
    assert {key for key in keys - dealt_with if why_not(key) is None} == set()


def test_the_reasons_name_real_keys_of_ours() -> None:
    """`parallel.cpu_offload` and the like in the reasons exist."""
    sections = "|".join(RunConfig.model_fields)
    named = {m for reason in NO_COUNTERPART.values() for m in re.findall(rf"\b(?:{sections})\.[a-z_.]*[a-z_]", reason)}
    sections_too = {"resilience.anomaly", "train.batch_ramp"}
    known = set(valid_keys(optional=True)) | sections_too
    assert len(named) > 8
    assert named - known == set()
