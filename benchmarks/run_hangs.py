"""The trials behind `benchmarks/faults.py run` whose ranks die one by one, hang, or lose numbers."""

from __future__ import annotations

import itertools
import random
import re
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from checkpoint_faults import Row
from run_faults import CONFIG, LAYOUTS, PATIENCE_SECONDS, Trial, compare, exit_code, read_lines, undisturbed

from disttrain.config.load import load_config
from disttrain.config.resilience import ResilienceConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.testing import RankPool
from disttrain.testing.bad_numbers import Fault
from disttrain.testing.commands import Command, wait_until
from disttrain.testing.tiny import write_tiny
from disttrain.train.build import build_model
from disttrain.train.replica_check import ReplicaCheck
from disttrain.train.step import train_step

LEAVE_SECONDS = 5.0
AGAIN_SECONDS = 15.0


def dead_ranks(home: Path, trials: int, rng: random.Random) -> Row:
    """A rank of a run dies: its peers are gone in time, the first restart trains again, the message names it."""
    row = Row("a dead rank")
    trial = Trial(home / "dead")
    command = trial.start("train.microbatch_size=1")
    try:
        moment = 0.0
        for index in range(trials):
            problem = "" if trial.wait_for_training(moment) else f"no training: {trial.said()}"
            time.sleep(rng.uniform(0.0, 1.0))
            wait_until(lambda: len(command.ranks()) == trial.nproc, PATIENCE_SECONDS)
            restarts, ranks, moment = len(trial.events("restart")), command.ranks(), time.time()
            victim = rng.choice(ranks)
            victim.kill()
            gone = wait_until(lambda r=ranks: not any(map(_alive, r)), LEAVE_SECONDS)
            left = time.time() - moment
            if not problem and not gone:
                problem = f"peers were still there after {LEAVE_SECONDS:g} s"
            again = trial.wait_for_training(moment)
            took = time.time() - moment
            problem = problem or ("" if again and took <= AGAIN_SECONDS else f"trained again after {took:.1f} s")
            new = trial.events("restart")[restarts:]
            named = f"(process {victim.pid}) was killed by SIGKILL" in (trial.home / "stderr").read_text()
            problem = problem or ("" if len(new) == 1 and named else f"{len(new)} restarts, named: {named}")
            row.add(f"trial {index}", problem or _strangers(command))
            row.counts["within 5 s left"] += left <= LEAVE_SECONDS
            row.counts["within 15 s again"] += took <= AGAIN_SECONDS
            if command.poll() is not None:
                break
        _end(row, trial, command, moment)
        if command.session():
            row.failures.append(f"left over: {command.session()}")
    finally:
        command.end()
    return row


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _strangers(command: Any) -> str:
    """Processes of the session, or ports that it listens on, that are no rank's or the launcher's."""
    known = {command.pid, *(rank.pid for rank in command.ranks())}
    found = [process for process in command.session() if process.pid not in known and _alive(process)]
    ports = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in {p.pid for p in found}]
    return f"orphans {found}, ports {ports}" if found else ""


def hung_ranks(home: Path, trials: int, rng: random.Random) -> Row:
    """Stopped, in an endless loop, or in a collective that nobody else calls: named, ended, started again."""
    row = Row("a hung rank")
    # Three ranks: of two in different collectives nobody can say which is right.
    settings = ("train.microbatch_size=1", "train.global_batch_tokens=384", "checkpoint.every=2")
    # Where a rank hangs in an evaluation or in a save, which may take longer than a step.
    settings += ("resilience.collective_timeout_seconds=15",)
    trial = Trial(home / "hung", settings, nproc=3)
    command = trial.start()
    try:
        moment = 0.0
        for index in range(trials):
            if not trial.wait_for_training(moment):
                row.add(f"trial {index}", f"no training: {trial.said()}")
                break
            time.sleep(rng.uniform(0.0, 0.5))
            how, rank, moment = ("stopped", "hang", "disorder")[index % 3], rng.randrange(3), time.time()
            told = len(trial.events("hang"))
            if how == "stopped":
                command.ranks()[rank].send_signal(signal.SIGSTOP)
            else:
                (trial.home / f"{how}-{rank}").touch()
            ended = wait_until(lambda n=told: len(trial.events("hang")) > n or command.poll() is not None, 60.0)
            said = trial.events("hang")[told:]
            blamed = rf": (ranks are in different collectives: )?rank {rank} (on|of 3 does not answer)"
            named = bool(said) and re.search(blamed, said[-1]["text"]) is not None
            row.counts[how] += 1
            row.add(f"{how}, rank {rank}", "" if ended and named else f"said {said}, {trial.said()}")
        _end(row, trial, command, moment)
    finally:
        command.end()
    steps = trial.status()["step"]
    reference = undisturbed(home / "hung-undisturbed", settings, steps, nproc=3)
    if problem := compare(trial, reference.losses(), steps):
        row.failures.append(f"the trace of all hangs together: {problem}")
        row.passed = 0
    return row


def _end(row: Row, trial: Trial, command: Command, moment: float) -> None:
    """After the last fault it trains again, and stops as it is asked to."""
    again = trial.wait_for_training(moment)
    (trial.folder / "STOP").touch()
    if (code := exit_code(command)) != 75 or not again:
        row.failures.append(f"at the end: training again {again}, exit code {code}: {trial.said()}")
        row.passed = 0


def bad_numbers(home: Path, pool: RankPool, trials: int, rng: random.Random) -> list[Row]:
    """A row for each place and value; the step is the one in which it happens, and the only one."""
    rows = []
    (home / "bad").mkdir()
    config = write_tiny(home / "bad", CONFIG, cache=home / "cache")
    for where, value in itertools.product(("loss", "gradient", "parameter"), ("nan", "inf", "spike")):
        row = Row(f"{value} in {'a ' + where if where == 'parameter' else 'one rank’s ' + where}")
        for index in range(trials):
            layout, step = LAYOUTS[index % len(LAYOUTS)], rng.randrange(15, 30)
            world = 4 if layout[0] == "hsdp" else 2
            folder = home / "bad" / f"{where}-{value}-{index}"
            fault = Fault(step, rng.randrange(world), where, value)  # type: ignore[arg-type]
            settings = (f"parallel.strategy={layout[0]}", *layout[1:], f"run.dir={folder}", "train.steps=45")
            judge = ("resilience.anomaly.warmup_steps=8", "resilience.anomaly.window_steps=16")
            ended = pool.run(
                "disttrain.testing.bad_numbers:spoilt_run",
                world,
                PATIENCE_SECONDS,
                config=str(config),
                overrides=(*settings, *judge, "train.microbatch_size=1", "resilience.compare_replicas_every=0"),
                faults=[fault],
            )
            row.add(f"{fault} {layout[0]}", _skipped_once(folder, ended, step, world, where, value))
            row.counts[layout[0]] += 1
        rows.append(row)
    return rows


def comparison_cost(pool: RankPool, rounds: int) -> Row:
    """One comparison of the copies against a training step of the quickstart model, in pairs, on two ddp ranks."""
    row = Row("cost of comparing copies")
    share = statistics.median(pool.run("run_hangs:comparison_shares", 2, 300.0, rounds=rounds)[0])
    every = ResilienceConfig().compare_replicas_every
    percent = 100 * share / every
    row.counts["millionths of the time, at the default"] = round(1e4 * percent)
    row.add(f"{percent:.3f} %", "" if percent < 0.5 else f"{percent:.2f} % of the time")
    return row


def comparison_shares(rank: int, world: int, rounds: int) -> list[float]:
    config = load_config(Path(__file__).parents[1] / "configs/quickstart.toml", ["parallel.strategy=ddp"]).config
    model = config.model.model_copy(update={"vocab_size": 4096})
    length, device = config.train.sequence_length, torch.device("cpu")
    mesh = build_mesh(config.dims(world), "cpu")
    gpt, parallel = build_model(model, max_length=length, mesh=mesh, parallel=config.parallel, seed=0, device=device)
    engine = NativeEngine(
        gpt, parallel, build_optimizer(gpt, config.optim, GPT_PLAN), parallel=config.parallel, device=device
    )
    check = ReplicaCheck(config, gpt, world)
    tokens = torch.randint(4096, (config.train.microbatch_size, length + 1))
    shares = []
    for _ in range(rounds):
        began = time.perf_counter()
        train_step(engine, [(tokens[:, :-1], tokens[:, 1:])], lr_factor=1.0, device=device)
        stepped = time.perf_counter()
        check.dist_compare(0)
        shares.append((time.perf_counter() - stepped) / (stepped - began))
    return shares[1:]


def _skipped_once(folder: Path, ended: list[Any], step: int, world: int, where: str, value: str) -> str:
    told = [event for event in read_lines(folder, "events.jsonl") if event["kind"] in ("skipped", "rollback")]
    kinds, skipped = [event["kind"] for event in told], [event["step"] for event in told if event["kind"] == "skipped"]
    if ended != [("completed", [])] * world:
        return f"{ended}"
    if where == "parameter" and value == "spike":
        # It stays until the rollback: the steps until then are bad too, and none after it.
        bad = list(range(step, step + len(skipped)))
        return "" if skipped == bad and kinds == ["skipped"] * len(bad) + ["rollback"] else f"{skipped}, {kinds}"
    if skipped != [step] or kinds.count("rollback") != (where == "parameter"):
        return f"{kinds} at {skipped}"
    return ""
