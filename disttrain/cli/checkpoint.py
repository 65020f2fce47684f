"""disttrain checkpoint: list, verify and export what a run has saved. `ls` and `verify` need no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from disttrain.checkpoint.manifest import MANIFEST_NAME, read_manifest
from disttrain.checkpoint.verification import missing_bytes, verify_files
from disttrain.errors import EXIT_DONE, EXIT_FAILED, UserError

PathArgument = Annotated[Path, typer.Argument(help="A run folder, its checkpoints/ or one step-XXXXXXXX.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print {'rows': [...]}.")]

DTYPES = ("float64", "float32", "bfloat16", "float16")
WHOLE = "whole"
UNFINISHED = "unfinished save (ignored; the next save removes it)"
NO_MANIFEST = "no manifest (ignored)"
_STEP = re.compile(r"step-(\d{8})(\.tmp-.*)?")

checkpoint_app = typer.Typer(help="List, verify or export the checkpoints of a run.", no_args_is_help=True)


@dataclass(frozen=True)
class Row:
    """One directory as `ls --json` shows it; what only a sound manifest can tell is None without one."""

    step: int | None
    tokens: int | None
    bytes: int | None
    files: int | None
    strategy: str | None
    world_size: int | None
    run_id: str | None
    directory: str
    state: str
    problems: tuple[str, ...] = ()


@checkpoint_app.command("ls")
def ls_command(path: PathArgument, as_json: JsonOption = False) -> None:
    """List checkpoints, newest first. "whole": manifest sound, files there with their sizes; `verify` reads them."""
    # A run that is going deletes its oldest checkpoint at any moment.
    rows = [row for directory in _directories(path) if (row := _row(directory)) and directory.is_dir()]
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1))
        return
    lines = [("checkpoint", "tokens", "MB", "files", "ranks", "state"), *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    for name, *middle, state in lines:
        numbers = (cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=True))
        print("  ".join((name.ljust(widths[0]), *numbers, state)))


@checkpoint_app.command("verify")
def verify_command(path: PathArgument, as_json: JsonOption = False) -> None:
    """Read every byte of each checkpoint and compare it with the manifest; exit code 1 when one is damaged."""
    rows: list[dict[str, Any]] = []
    for directory in _committed(path):
        row = _verified(directory)
        if not directory.is_dir():
            continue  # deleted meanwhile by a run that is going
        rows.append(row)
        if not as_json:
            print("\n".join(_verdict(directory, row)), flush=True)
    if not rows:
        raise UserError(f"{path}: a run deleted every checkpoint while it was being read; run this again")
    if as_json:
        print(json.dumps({"rows": rows}, indent=1))
    damaged = sum(not row["ok"] for row in rows)
    if damaged and not as_json:
        sound = next((Path(row["directory"]).name for row in rows if row["ok"]), "none")
        print(f"{damaged} of {len(rows)} damaged; newest sound checkpoint: {sound}")
    raise typer.Exit(EXIT_FAILED if damaged else EXIT_DONE)


@checkpoint_app.command("export")
def export_command(
    path: PathArgument,
    out: Annotated[Path, typer.Argument(help="The file to write: NAME.safetensors.")],
    step: Annotated[int | None, typer.Option(min=0, help="Default: the newest that verifies.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: as stored.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write the weights alone to one safetensors file, for any program. A tied head is stored once (no head key)."""
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the file will be safetensors; give it a name that ends in .safetensors")
    candidates = _committed(path) if step is None else [_of_step(path, step)]

    import torch

    from disttrain.checkpoint.export import DamagedCheckpointError, export_weights

    rejected: list[str] = []
    for directory in candidates:
        try:
            done = export_weights(directory, out, getattr(torch, dtype) if dtype else None, force)
        except DamagedCheckpointError as error:
            rejected.extend(error.problems)
            continue
        for problem in rejected:
            print(f"note: passed over: {problem}")
        size = f"{done.tensors:,} tensors, {done.parameters:,} parameters, {done.bytes:,} bytes"
        print(f"{out}: step {done.step} of {done.run_id}, {size}")
        print(f'load it with safetensors.torch.load_file("{out}")')
        return
    which = "no checkpoint that verifies" if step is None else f"step {step} is damaged"
    raise UserError([*rejected, f"{path}: {which}, so nothing was written; see disttrain checkpoint verify {path}"])


def _directories(path: Path) -> list[Path]:
    """Every directory that is, was or was to become a checkpoint, newest first; UserError when there is none."""
    path = path if path.name not in ("", "..") else path.resolve()
    try:
        if (path / MANIFEST_NAME).is_file() or (_STEP.fullmatch(path.name) and path.is_dir()):
            return [path]
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found = sorted((child for child in folder.iterdir() if _STEP.fullmatch(child.name)), reverse=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a run folder, its checkpoints/ or a step-XXXXXXXX") from None
    if not found:
        remedy = "name a run folder that has saved one, its checkpoints/ or a step-XXXXXXXX"
        raise UserError(f"{folder}: no checkpoint here; {remedy}")
    return found


def _committed(path: Path) -> list[Path]:
    """Those that count: with a manifest, under a name of their own."""
    found = _directories(path)
    committed = [directory for directory in found if not _ignored(directory)]
    if not committed:
        reasons = [f"{directory}: {_ignored(directory)}" for directory in found[:3]]
        raise UserError([*reasons, f"{path}: no committed checkpoint here; name a run folder that has saved one"])
    return committed


def _of_step(path: Path, step: int) -> Path:
    committed = _committed(path)
    for directory in committed:
        if _step(directory) == step:
            return directory
    there = ", ".join(directory.name for directory in committed[:8])
    raise UserError(f"--step {step}: no such checkpoint in {path}; there {'are' if committed[1:] else 'is'} {there}")


def _step(directory: Path) -> int | None:
    """From the name, or from the manifest of a checkpoint that was copied to another name."""
    if named := _STEP.fullmatch(directory.name):
        return int(named[1])
    try:
        return read_manifest(directory).step
    except UserError:
        return None


def _ignored(directory: Path) -> str | None:
    """Why training would not look at a directory."""
    if ".tmp-" in directory.name:
        return UNFINISHED
    try:
        return None if (directory / MANIFEST_NAME).is_file() else NO_MANIFEST
    except OSError as error:
        return f"cannot look inside: {error.strerror}"


def _row(directory: Path) -> Row:
    unknown = Row(_step(directory), None, None, None, None, None, None, str(directory), _ignored(directory) or "")
    if unknown.state:
        return unknown
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        return replace(unknown, state=_first(directory, error.problems), problems=error.problems)
    problems = missing_bytes(directory, manifest)
    return Row(
        step=manifest.step,
        tokens=manifest.tokens,
        bytes=sum(entry.bytes for entry in manifest.files),
        files=len(manifest.files),
        strategy=manifest.strategy,
        world_size=manifest.world_size,
        run_id=manifest.run_id,
        directory=str(directory),
        state=_first(directory, problems) if problems else WHOLE,
        problems=tuple(problems),
    )


def _cells(row: Row) -> tuple[str, ...]:
    name = Path(row.directory).name
    if row.tokens is None or row.bytes is None:
        return (name, "-", "-", "-", "-", row.state)
    return (
        name,
        f"{row.tokens:,}",
        f"{row.bytes / 1e6:,.1f}",
        f"{row.files:,}",
        f"{row.strategy} x {row.world_size}",
        row.state,
    )


def _first(directory: Path, problems: Sequence[str]) -> str:
    """The first problem, short enough for a table."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0].removeprefix(f"{directory}/") + more


def _verified(directory: Path) -> dict[str, Any]:
    """One row of `verify --json`."""
    files, size = 0, 0
    try:
        manifest = read_manifest(directory)
        files, size = len(manifest.files), sum(entry.bytes for entry in manifest.files)
        problems = list(verify_files(directory, manifest))
    except UserError as error:
        problems = list(error.problems)
    about = {"step": _step(directory), "directory": str(directory), "ok": not problems}
    return about | {"files": files, "bytes": size, "problems": problems}


def _verdict(directory: Path, row: dict[str, Any]) -> list[str]:
    if row["ok"]:
        return [
            f"{directory.name}: ok, {row['files']:,} {'file' if row['files'] == 1 else 'files'}, {row['bytes']:,} bytes"
        ]
    return [f"{directory.name}: damaged: {problem.removeprefix(f'{directory}/')}" for problem in row["problems"]]
