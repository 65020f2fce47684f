"""Everything that can be refused before a process is started or torch imported."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disttrain.checkpoint.manifest import MANIFEST_NAME, Manifest, committed_steps, read_manifest
from disttrain.config import RunConfig
from disttrain.config.load import flat_items
from disttrain.data.source import Data, check_length, check_token_ids, open_data
from disttrain.errors import UserError
from disttrain.train.extras import check_extras
from disttrain.train.folder import RunFolder
from disttrain.train.swap_disk import check_swap_disk

_FIXED = ("model.", "train.sequence_length", "train.seed")
"""What a checkpoint's weights and data position depend on: another value is another run."""
_IDENTITY = ("fingerprint", "tokenizer_sha256")
"""What makes data the same; names and versions are only told."""
_DRAWN = ("model.init", "model.init_std")
"""What decides about initial weights only, and not about those of a checkpoint."""
_SILENT = ("run.", "monitor.", "data.")


@dataclass(frozen=True)
class PreparedRun:
    """A checked run: `config` knows its vocabulary, `data` is open, `notes` are lines to print. `started` is when this
    start of it began (Unix time), `earlier` the status that the one before has left."""

    config: RunConfig
    data: Data
    folder: RunFolder
    run_id: str
    notes: tuple[str, ...]
    started: float = field(default_factory=time.time)
    earlier: dict[str, Any] = field(default_factory=dict)


def is_complete(config: RunConfig) -> bool:
    """The run folder says that this run has done all its steps."""
    folder = RunFolder(config.run_dir)
    status = folder.read_status()
    if config.run.resume == "never" or status.get("state") != "completed":
        return False
    if config.train.tokens is None:
        return status.get("step", 0) >= config.train.total_steps
    # How many steps they take depends on the batches that the run has had.
    manifest = _newest_readable(committed_steps(folder.checkpoints))
    return manifest is not None and manifest.tokens >= config.train.tokens


def prepare_run(config: RunConfig) -> PreparedRun:
    """Open the data, settle the vocabulary, and compare with what the run folder already holds; UserError otherwise."""
    started = time.time()
    check_extras(config.monitor, config.engine)
    check_swap_disk(config)
    if config.parallel.compile and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError(
            "parallel.compile = true: torch.compile calls a C++ compiler, and neither g++ nor clang++ is on PATH; "
            "install one or set parallel.compile=false"
        )
    data = open_config_data(config)
    check_length(data, config.train.sequence_length)
    vocab_size = _vocabulary(config, data)
    check_token_ids(data, vocab_size)
    config = config.with_vocab_size(vocab_size)
    folder = RunFolder(config.run_dir)
    notes = (
        *data.notes,
        *_schedule_notes(config),
        *_engine_notes(config),
        *_compare_with_checkpoint(config, data, folder),
    )
    earlier = {} if config.run.resume == "never" else folder.read_status()
    return PreparedRun(config, data, folder, _run_id(config, data), notes, started, earlier)


def open_config_data(config: RunConfig) -> Data:
    section = config.data
    return open_data(
        source=section.source,
        path=section.path and str(Path(section.path).expanduser()),
        tokenizer=str(Path(section.tokenizer).expanduser()),
        vocab_size=section.vocab_size,
        validation_fraction=section.validation_fraction,
        cache_directory=Path(section.cache_dir).expanduser(),
        seed=config.train.seed,
    )


def _engine_notes(config: RunConfig) -> list[str]:
    if config.engine != "deepspeed" or not config.monitor.noise_scale_every:
        return []
    return ["the noise scale is not measured: DeepSpeed reduces gradients before anybody sees those of each process"]


def _schedule_notes(config: RunConfig) -> list[str]:
    batches, steps = config.train.batches(), config.train.total_steps
    notes = []
    if batches.tokens_after(steps) <= batches.stages[-1].from_tokens:
        notes.append(
            f"train.batch_ramp reaches its last batch after {batches.stages[-1].from_tokens:,} tokens, and the run "
            f"ends at {batches.tokens_after(steps):,}"
        )
    profiled = config.profile.steps
    if profiled is not None and profiled[0] > steps:
        notes.append(f"profile.steps begin at {profiled[0]}, and the run has {steps}: nothing will be profiled")
    flat = [law for law in config.lr_schedules(config.train.batches()) if law.warmup_tokens == law.horizon_tokens]
    if not flat:
        return notes
    return [
        *notes,
        f"the warm-up of {flat[0].warmup_tokens:,} tokens reaches to the end of the run: the rate only rises",
    ]


def _vocabulary(config: RunConfig, data: Data) -> int:
    wanted = config.model.vocab_size
    if data.tokenizer is None:
        if wanted is None:
            raise UserError(
                f"data.path = {config.data.path}: token files do not say how large their vocabulary is; set "
                "model.vocab_size (GPT-2: 50257), or data.tokenizer to the tokenizer.json that made them"
            )
        return wanted
    if wanted is not None and wanted < data.tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {wanted} is smaller than the tokenizer's {data.tokenizer.vocab_size} entries; "
            "raise it or leave it out"
        )
    return wanted or data.tokenizer.vocab_size


def _compare_with_checkpoint(config: RunConfig, data: Data, folder: RunFolder) -> list[str]:
    """Lines about what changed since the newest checkpoint; UserError for what must not."""
    steps = committed_steps(folder.checkpoints)
    if config.run.resume == "must" and not steps:
        raise UserError(f'run.resume = "must", but {folder.checkpoints} holds no checkpoint; train first, or drop it')
    if config.run.resume == "never" and steps:
        raise UserError(
            f'run.resume = "never", but {folder.path} holds {steps[0].name}; give the run another name or '
            "remove the folder"
        )
    if not steps:
        return _compare_with_origin(config, data)
    manifest = _newest_readable(steps)
    if manifest is None:
        return []  # the checkpoint manager says so
    now, before = flat_items(config), _flat(manifest.config)
    changed = [key for key in now if key in before and _plain(now[key]) != before[key]]
    lines = {key: f"{key} was {_said(before[key])}, is {_said(_plain(now[key]))}" for key in changed}
    refused = [line for key, line in lines.items() if key.startswith(_FIXED)]
    identity = {key: (manifest.data.get(key), data.identity[key]) for key in _IDENTITY}
    refused += [f"data: {key} was {was!r}, is {value!r}" for key, (was, value) in identity.items() if was != value]
    if refused:
        remedy = f"{folder.path} holds step {manifest.step} of another run: undo the change or set another run.name"
        raise UserError([*refused, remedy])
    return [f"changed since step {manifest.step}: {line}" for key, line in lines.items() if not key.startswith(_SILENT)]


def _said(value: Any) -> str:
    return "not set" if value is None else repr(value)


def _compare_with_origin(config: RunConfig, data: Data) -> list[str]:
    """Whether `train.init_from` holds weights that fit: lines to tell; UserError when there is no use in starting."""
    if config.train.init_from is None:
        return []
    path = Path(config.train.init_from).expanduser()
    steps = [path] if (path / MANIFEST_NAME).exists() else committed_steps(path / "checkpoints")
    if not steps:
        raise UserError(f"train.init_from = {path}: no checkpoint there; name a run folder or one of its checkpoints")
    manifest = _newest_readable(steps)
    if manifest is None:
        read_manifest(steps[0])  # says what is wrong with it
        return []
    theirs = _flat(manifest.config)
    ours = {key: _plain(value) for key, value in flat_items(config).items() if key.startswith("model.")}
    changed = [key for key in ours if key in theirs and theirs[key] != ours[key] and key not in _DRAWN]
    if changed:
        lines = [f"{key} is {theirs[key]!r} there, {ours[key]!r} here" for key in changed]
        raise UserError([*lines, f"train.init_from = {path}: weights of another model; set the same model section"])
    if manifest.data.get("tokenizer_sha256") == data.identity["tokenizer_sha256"]:
        return []
    return [f"train.init_from = {path}: trained with another tokenizer; its embeddings mean other pieces of text"]


def _newest_readable(steps: list[Path]) -> Manifest | None:
    """Of damaged checkpoints the manager, which falls back too, gives the reasons."""
    for step in steps:
        with suppress(UserError):
            return read_manifest(step)
    return None


def _run_id(config: RunConfig, data: Data) -> str:
    """The same after every restart: made of what a resumed run may not change."""
    fixed = {key: _plain(value) for key, value in flat_items(config).items() if key.startswith(_FIXED)}
    content = json.dumps([fixed, [data.identity[key] for key in _IDENTITY]], sort_keys=True)
    return f"{config.run.name}-{hashlib.blake2b(content.encode(), digest_size=4).hexdigest()}"


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
