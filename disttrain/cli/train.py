"""disttrain train: start the ranks, or be one of those that a launcher started."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from disttrain.checkpoint.manifest import committed_steps
from disttrain.cli.problems import leave_with_problems
from disttrain.config import RunConfig
from disttrain.config.accelerate import VARIABLES, launcher_problems
from disttrain.config.load import layout_problems, load_config
from disttrain.distributed.env import Ranks, read_ranks, read_variables, tell_engines
from disttrain.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_GIVE_UP, EXIT_PREEMPTED, UserError
from disttrain.launching.parent import die_with_parent
from disttrain.resilience import RestartBudget, StopRequest, heard_signals, lost_peers
from disttrain.train.folder import RunFolder, State
from disttrain.train.preflight import PreparedRun, is_complete, prepare_run
from disttrain.train.swap_disk import swap_space

AGENTS_AGREE_SECONDS = 3.0
"""How long after one agent the last one may learn of a node that comes or goes: each looks ten times a second."""
FORKS_ARRIVE_SECONDS = 60.0
"""How long forked ranks wait for each other at most: they have nothing to load, and a fork of a process with threads
can hang in a lock that one of these held."""
WATCHDOG_FIRST_SECONDS = 10.0
"""How much longer a collective may take than its watchdog lets it: a collective that gives up names nobody."""


def train_command(
    config: Annotated[Path, typer.Argument(help="A TOML file, or the folder of a run to continue.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine (train.nproc).")] = None,
) -> None:
    """Train a model; resume it when its run folder holds a checkpoint."""
    ranks = read_ranks()
    if ranks is None:
        sys.exit(start_run(load_config(config, overrides or [], nproc=nproc).config))
    if nproc not in (None, ranks.local_world):
        raise UserError(
            f"--nproc {nproc}, but a launcher has started {ranks.local_world} processes here already: leave it out"
        )
    code = _join(load_config(config, overrides or [], world=ranks.world).config, ranks)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by sys.exit: threads of gloo have been seen to abort a rank in the interpreter's teardown.
    os._exit(code)


def start_run(config: RunConfig) -> int:
    """Be the parent: check everything that needs no torch, then start the ranks and answer for them."""
    folder = RunFolder(config.run_dir)
    with folder.owned():
        run = prepare_run(config)
        if is_complete(config):
            return _nothing_to_do(config)
        _print_notes(run)
        _forget_old_wishes(folder)
        # From here on a signal is a request to stop, to which the ranks, or we for them, give the answer.
        with StopRequest() as stop, swap_space(config):
            return _answer(folder, _launch(run, stop), stop)


def _launch(run: PreparedRun, stop: StopRequest) -> int:
    """Start the ranks, and again when one dies or hangs, as long as that leads to new checkpoints."""
    # Only now: torch takes seconds to import, and bad input has been refused. Forked ranks find it imported.
    import disttrain.train.run  # noqa: F401
    from disttrain.distributed.process_group import default_processes, select_device
    from disttrain.launching.elastic import launch_ranks

    device = select_device(run.config.device)
    nproc = run.config.train.nproc or default_processes(device)
    if problems := layout_problems(run.config, nproc):
        raise UserError(problems)
    run.folder.write_status("running", run.folder.read_status().get("step", 0))
    budget = RestartBudget(run.config.resilience.max_restarts, committed_steps(run.folder.checkpoints))
    while True:
        ended = launch_ranks(rank_main, (run, os.getpid()), nproc, device.type, stop)
        # A rank may still die when all is said and done.
        over = run.folder.read_status().get("state") in ("completed", "preempted")
        if over or stop.wanted or not ended.may_start_again:
            break
        saved = committed_steps(run.folder.checkpoints)
        what = _tell_death(run.folder, ended.what)
        if not budget.allows(saved):
            break
        at = f"from step {_step(saved[0])}" if saved else "from the beginning"
        print(f"starting again {at} ({budget.used} of {budget.limit} restarts without a new checkpoint)", flush=True)
        run.folder.add_event("restart", _step(saved[0]) if saved else 0, f"{what}; starting again {at}")
        run = replace(run, started=time.time(), earlier=run.folder.read_status())
    return ended.code


def _tell_death(folder: RunFolder, what: str) -> str:
    """One line about a rank that could not speak for itself; others have said why they ended."""
    step = folder.last_step()
    if not what:
        return "a rank ended"
    print(f"error: {what}, after step {step} at least", file=sys.stderr, flush=True)
    folder.add_event("lost_rank", step, what)
    return what


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _answer(folder: RunFolder, code: int, stop: StopRequest) -> int:
    """The exit code of a run whose ranks have ended; status.json has the last word, and gets one where it has none."""
    status = folder.read_status()
    if status.get("state") == "completed":
        return EXIT_DONE
    if status.get("state") == "preempted":
        return EXIT_PREEMPTED
    steps = committed_steps(folder.checkpoints)
    if stop.wanted and steps:
        step = _step(steps[0])
        folder.write_status("preempted", step)
        print(f"stopped on request; start again to resume from step {step}, {folder.path}", flush=True)
        return EXIT_PREEMPTED
    if stop.wanted:
        print(f"stopped on request before there was a checkpoint; nothing to resume, {folder.path}", flush=True)
    folder.write_failed()
    return EXIT_BAD_INPUT if code == EXIT_BAD_INPUT else EXIT_FAILED


def _join(config: RunConfig, ranks: Ranks) -> int:
    """Be one rank of a launcher: torchrun restarts whatever leaves with another code than 0."""
    if problems := list(launcher_problems(config, read_variables(VARIABLES), ranks.world)):
        raise UserError(problems)
    if ranks.elastic:
        die_with_parent()
    with RunFolder(config.run_dir).owned() if ranks.is_first else nullcontext():
        run = prepare_run(config)
        if is_complete(config):
            return _nothing_to_do(config) if ranks.is_first else EXIT_DONE
        if ranks.is_first:
            _print_notes(run)
            _forget_old_wishes(run.folder)
        # Before all ranks meet, and after their last collective.
        with swap_space(config) if ranks.local_rank == 0 else nullcontext():
            state = _run_rank(run, ranks)
    if state == "preempted" and ranks.elastic and ranks.world > ranks.local_world:
        # When nodes come or go each agent asks its own ranks to stop, and all ranks stop with the first of them. One
        # that has left before its agent asked would be taken for done, and its node would not start again.
        time.sleep(AGENTS_AGREE_SECONDS)
    if state != "preempted" or ranks.elastic:
        return EXIT_DONE
    # A launcher that ends the others at the first code but 0 would end those that are not done yet.
    return EXIT_DONE if ranks.ends_peers and not ranks.is_first else EXIT_PREEMPTED


def _nothing_to_do(config: RunConfig) -> int:
    step = RunFolder(config.run_dir).read_status()["step"]
    print(f"{config.run_dir}: complete at step {step}; nothing to do")
    return EXIT_DONE


def _forget_old_wishes(folder: RunFolder) -> None:
    if folder.stop_file.exists():
        folder.stop_file.unlink(missing_ok=True)
        text = f"{folder.stop_file} was left from before and is taken away: make it again to stop this run"
        print(f"warning: {text}", flush=True)
        folder.add_event("warning", folder.last_step(), text)


def _print_notes(run: PreparedRun) -> None:
    for note in run.notes:
        print(f"note: {note}", flush=True)


def rank_main(run: PreparedRun, parent: int) -> None:
    """What a rank that `disttrain train` started runs; what it has come to stands in status.json."""
    _run_rank(run, read_ranks() or Ranks(), ours=True)
    await_collection(parent)


def await_collection(parent: int) -> None:
    """A rank that is done has nothing to stop, but a parent that died must not leave it behind.

    torch's agent holds a function that returned until it has collected all ranks' results, by a condition that awaits
    all who wait at it: for ever, when a stop signal ends us there. Of its death torch tells us by SIGINT.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getppid() != parent:
            os._exit(EXIT_DONE)

    for number in heard_signals():
        signal.signal(number, on_signal)
    if os.getppid() != parent:
        os._exit(EXIT_DONE)


def _run_rank(run: PreparedRun, ranks: Ranks, ours: bool = False) -> State:
    """`ours`: it was started by us, who start all ranks again unless it says that this is hopeless."""
    # A signal before the loop ends us at once: there is nothing to save yet.
    for number in heard_signals():
        signal.signal(number, signal.SIG_DFL)
    if run.config.parallel.compile:
        # torch keeps compiled code in a temporary folder otherwise, and the next start would compile again.
        kept = Path(run.config.data.cache_dir).expanduser() / "inductor"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
    from disttrain.distributed.process_group import distributed, select_device
    from disttrain.train.run import run_training

    try:
        device = select_device(run.config.device, ranks.local_rank)
        if run.config.engine != "native":
            tell_engines(ranks, on_cpu=device.type == "cpu")
        settings = run.config.resilience
        forked = ours and device.type == "cpu"
        arrival_seconds = min(settings.arrival_timeout_seconds, FORKS_ARRIVE_SECONDS if forked else math.inf)
        collective_seconds = settings.collective_timeout_seconds + WATCHDOG_FIRST_SECONDS
        with distributed(ranks, device, collective_seconds, arrival_seconds):
            return run_training(run, ranks, device)
    except UserError as error:
        _note_failure(run, ranks)
        hopeless = error.exit_code == EXIT_FAILED and not error.start_again
        leave_with_problems(error, ranks, EXIT_GIVE_UP if ours and hopeless else None)
    except BaseException:
        if sys.stdout.isatty():
            print("\x1b[?25h", end="")  # the progress bar hides the cursor and will not be closed
        # Never wait in teardown: peers may hang in a collective that this rank will not join.
        print(f"rank {ranks.rank} of {ranks.world} {_failure()}", file=sys.stderr, flush=True)
        _note_failure(run, ranks)
        os._exit(EXIT_FAILED)


def _failure() -> str:
    """A rank that only lost the others has nothing to say of its own."""
    if lost_peers(sys.exc_info()[1]):
        return "ends: the others are gone"
    return f"failed:\n{traceback.format_exc()}"


def _note_failure(run: PreparedRun, ranks: Ranks) -> None:
    """Say so in status.json, where a full disk still allows it."""
    if ranks.is_first:
        with suppress(OSError):
            run.folder.write_failed()
