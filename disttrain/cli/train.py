"""disttrain train: start the ranks, or be one of those that a launcher started."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from disttrain.config import RunConfig
from disttrain.config.load import LoadedConfig, layout_problems, load_config
from disttrain.distributed.env import Ranks, read_ranks
from disttrain.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, UserError
from disttrain.train.folder import RunFolder
from disttrain.train.preflight import PreparedRun, is_complete, prepare_run


def train_command(
    config: Annotated[Path, typer.Argument(help="A TOML file, or the folder of a run to continue.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine (train.nproc).")] = None,
) -> None:
    """Train a model; resume it when its run folder holds a checkpoint."""
    ranks = read_ranks()
    launched = "RANK" in os.environ
    loaded = load_config(config, overrides or [], nproc=nproc, world=ranks.world if launched else None)
    if is_complete(loaded.config):
        if ranks.is_first:
            print(f"{loaded.config.run_dir}: complete at step {loaded.config.train.total_steps}; nothing to do")
        return
    code = _join(loaded.config, ranks) if launched else _start(loaded)
    sys.exit(code)


def _start(loaded: LoadedConfig) -> int:
    """Be the parent: check everything that needs no torch, then start the ranks and answer for them."""
    config = loaded.config
    folder = RunFolder(config.run_dir)
    with folder.owned():
        run = prepare_run(config)
        for note in run.notes:
            print(f"note: {note}", flush=True)
        # Only now: torch takes seconds to import, and bad input has been refused.
        from disttrain.distributed.process_group import default_processes, select_device
        from disttrain.launching.elastic import launch_ranks

        device = select_device(config.device)
        nproc = config.train.nproc or default_processes(device)
        if problems := layout_problems(config, nproc):
            raise UserError(problems)
        folder.write_status("running", folder.read_status().get("step", 0))
        code = launch_ranks(rank_main, (run,), nproc, device.type)
        status = folder.read_status()
        if status.get("state") == "completed":
            return EXIT_DONE
        if status.get("state") == "preempted":
            return EXIT_PREEMPTED
        folder.write_status("failed", status.get("step", 0))
        return code or EXIT_FAILED


def _join(config: RunConfig, ranks: Ranks) -> int:
    """Be one rank of a launcher: torchrun restarts whatever leaves with another code than 0."""
    if not ranks.is_first:
        return _run_rank(prepare_run(config), ranks)
    with RunFolder(config.run_dir).owned():
        run = prepare_run(config)
        for note in run.notes:
            print(f"note: {note}", flush=True)
        return _run_rank(run, ranks)


def rank_main(run: PreparedRun) -> None:
    """What a rank that `disttrain train` started runs; its exit code is its only answer."""
    code = _run_rank(run, read_ranks())
    if code != EXIT_DONE:
        os._exit(code)


def _run_rank(run: PreparedRun, ranks: Ranks) -> int:
    from disttrain.distributed.process_group import distributed, select_device
    from disttrain.train.loop import run_training

    try:
        device = select_device(run.config.device, ranks.local_rank)
        with distributed(ranks, device, run.config.resilience.collective_timeout_seconds):
            state = run_training(run, ranks, device)
    except UserError as error:
        prefix = "" if ranks.is_first else f"rank {ranks.rank}: "
        print("\n".join(f"error: {prefix}{problem}" for problem in error.problems), file=sys.stderr, flush=True)
        os._exit(EXIT_BAD_INPUT)
    except BaseException:
        # Never wait in teardown: peers may hang in a collective that this rank will not join.
        print(f"rank {ranks.rank} of {ranks.world} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)
    return EXIT_PREEMPTED if state == "preempted" and not ranks.elastic else EXIT_DONE
