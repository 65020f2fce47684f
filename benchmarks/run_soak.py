"""The trial behind `benchmarks/faults.py soak`: one run, a fault a minute, and the weights that it ends with."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from checkpoint_faults import Row
from run_faults import PATIENCE_SECONDS, Trial, exit_code, kill, undisturbed
from safetensors.torch import load_file

from disttrain.checkpoint.manifest import committed_steps
from disttrain.testing import faults
from disttrain.testing.checkpoints import same_bits
from disttrain.testing.commands import Command, wait_until

SLEEP_SECONDS = 0.2
"""In each step, so that the hour is one of faults and not of steps."""
SETTINGS = (
    "parallel.strategy=ddp",
    "monitor.log_every=10",
    "checkpoint.every=50",
    "resilience.compare_replicas_every=20",
    "resilience.collective_timeout_seconds=15",
)
FAULTS = ("rank", "SIGTERM", "stopped", "launcher", "hang", "flip", "ranks", "STOP", "disorder", "damage")


def soak(home: Path, minutes: int, rng: random.Random, apart_seconds: float = 60.0) -> Row:
    """Every kind of fault in turn; whoever started the run starts it again when it has ended, and does nothing else."""
    row = Row("a soak of one fault a minute")
    trial = Trial(home / "soak", SETTINGS)
    (trial.home / "slow").write_text(str(SLEEP_SECONDS))
    command, moment, began = trial.start(), 0.0, time.time()
    try:
        for index in range(minutes):
            again = _trains_again(trial, moment)
            row.add(f"minute {index}", "" if again else f"it does not train: {trial.said()}")
            if not again:
                return row
            time.sleep(max(0.0, began + apart_seconds * (index + rng.random()) - time.time()))
            fault, moment = FAULTS[index % len(FAULTS)], time.time()
            row.counts[fault] += 1
            command = _inflict(trial, command, fault, rng)
            print(f"  soak, minute {index}: {fault}", flush=True)
        _trains_again(trial, moment)
        (trial.home / "slow").unlink()
        (trial.folder / "STOP").touch()
        if (code := exit_code(command)) != 75:
            row.failures.append(f"exit code {code} at the end")
    finally:
        command.end()
    steps = trial.status()["step"]
    clean = undisturbed(home / "soak-undisturbed", SETTINGS, steps)
    row.counts["steps"] = steps
    row.counts["weights and optimizer state equal to the bit"] = int(_saved_equal(trial, clean, steps))
    # The clean run logs its last step too, which a run that is stopped does not.
    expected = {step: loss for step, loss in clean.losses().items() if step == 1 or step % 10 == 0}
    if not row.counts["weights and optimizer state equal to the bit"] or trial.losses() != expected:
        row.failures.append("it did not end as the clean run does")
        row.passed = 0
    return row


def _trains_again(trial: Trial, moment: float) -> bool:
    return wait_until(lambda: trial.training_since(moment), PATIENCE_SECONDS, pause=0.5)


def _inflict(trial: Trial, command: Command, fault: str, rng: random.Random) -> Command:
    """Returns the command that trains afterwards."""
    rank = rng.randrange(2)
    if fault in ("rank", "ranks"):
        kill(command, fault, rng)
    elif fault == "damage":
        newest = committed_steps(trial.folder / "checkpoints")[0]
        faults.flip_bit(*faults.random_bit(newest, rng))
        kill(command, "ranks", rng)
    elif fault == "stopped":
        command.ranks()[rank].send_signal(signal.SIGSTOP)
    elif fault in ("hang", "disorder", "flip"):
        (trial.home / f"{fault}-{rank}").touch()
    else:
        if fault == "STOP":
            (trial.folder / "STOP").touch()
        else:
            command.send_signal(signal.SIGKILL if fault == "launcher" else signal.SIGTERM)
        if exit_code(command) != (-signal.SIGKILL if fault == "launcher" else 75):
            raise RuntimeError(f"{fault}: exit code {command.returncode}: {trial.said()}")
        wait_until(lambda: not command.session(), PATIENCE_SECONDS)
        return trial.start()
    return command


def _saved_equal(trial: Trial, clean: Trial, step: int) -> bool:
    places = [one.folder / "checkpoints" / f"step-{step:08d}" for one in (trial, clean)]
    files = [sorted(path.name for path in place.glob("*.safetensors")) for place in places]
    return (
        bool(files[0])
        and files[0] == files[1]
        and all(same_bits(load_file(places[0] / name), load_file(places[1] / name)) for name in files[0])
    )
