"""Runs under a real Slurm: `python benchmarks/slurm.py [--only NAME]`, minutes on two cores; as root, with the packages
slurm-wlm and munge.

A virtual cluster of two nodes comes up on loopback and goes away again. To it go the scripts of `disttrain launch`:

- `limit`: two nodes with two ranks each meet the time limit, save, are requeued and resume until the run is complete;
  no bit of the losses may differ from a run that nothing happened to. Once with srun starting every rank, where Slurm's
  own signal reaches them, once with torchrun, where they look at the clock, or the batch script leaves them a file;
- `stop`: USR1, as Slurm sends it, long before the limit: the run saves, and is not requeued;
- `kill`: SIGKILL for one rank: srun's ranks all end and the job fails; torchrun starts its ranks again.

Writes results/slurm.json and .md. Exits 1 when something is not as expected.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from disttrain.launching.files import job_files
from disttrain.launching.job import check_job
from disttrain.launching.wishes import Wishes
from disttrain.testing.virtual_slurm import VirtualCluster, missing_slurm, virtual_cluster

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
CONFIG = """
device = "cpu"
[model]
n_layers = 1
d_model = 16
n_heads = 2
[data]
source = "synthetic"
tokenizer = "bytes"
cache_dir = "{folder}/cache"
[train]
steps = {steps}
global_batch_tokens = 256
microbatch_size = 2
sequence_length = 32
[schedule]
horizon_steps = 1000
[checkpoint]
every = 200
[monitor]
log_every = 1
evaluate_every = 1000000
sample_tokens = 0
[resilience]
stop_before_limit_seconds = {stop}
"""
STOP_SECONDS = 20
LIMIT_MINUTES = 2
ENDLESS = 1_000_000
WAIT_SECONDS = 420.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


class Row(NamedTuple):
    """One submitted job: what it came to, and whether that is what was expected."""

    scenario: str
    target: str
    job_state: str
    starts: int
    run_state: str
    step: int
    seconds: float
    passed: bool
    remark: str


class Case:
    """A run of its own, submitted by a script of `disttrain launch`."""

    def __init__(self, cluster: VirtualCluster, folder: Path, scenario: str, target: str, steps: int) -> None:
        self.cluster, self.scenario, self.target = cluster, scenario, target
        self.folder = folder / f"{scenario}-{target}"
        self.folder.mkdir()
        self.run_dir = self.folder / "run"
        self.config = self.folder / "tiny.toml"
        self.set_steps(steps)
        self.began = time.monotonic()
        self.job = ""

    def set_steps(self, steps: int) -> None:
        """The next start reads it."""
        self.config.write_text(CONFIG.format(folder=self.folder.parent, steps=steps, stop=STOP_SECONDS))

    def submit(self, *sbatch: str) -> None:
        wishes = Wishes(nodes=2, nproc=2, env=[f"PYTHONPATH={ROOT}", f"PYTHON={sys.executable}"], cpus=1)
        job = check_job(self.target, self.config, [f"run.dir={self.run_dir}"], wishes)
        script = self.folder / "script.sbatch"
        script.write_text(next(iter(job_files(job).values())))
        output = f"--output={self.folder}/job-%j.out"
        said = self.cluster.run("sbatch", "--parsable", f"--chdir={self.folder}", output, *sbatch, str(script))
        self.job = said.stdout.strip()
        if not self.job.isdigit():
            raise OSError(f"sbatch: {said.stderr}")

    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self.run_dir / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def losses(self) -> dict[int, float]:
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return {}
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"{self.scenario} {self.target}: {self.cluster.job(self.job)}\n{self.log()}")
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: max(self.losses(), default=0) >= step)

    def wait_for_end(self) -> str:
        self.wait(lambda: self.cluster.job(self.job).get("JobState", "") in ENDED)
        return self.cluster.job(self.job)["JobState"]

    def log(self) -> str:
        logs = sorted(self.folder.rglob("*.out")) + sorted(self.folder.rglob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in logs)

    def row(self, passed: bool, remark: str) -> Row:
        job, status = self.cluster.job(self.job), self.status()
        seconds = round(time.monotonic() - self.began, 1)
        starts = int(job.get("Restarts", 0)) + 1
        row = Row(
            scenario=self.scenario,
            target=self.target,
            job_state=job.get("JobState", "?"),
            starts=starts,
            run_state=status.get("state", "?"),
            step=status.get("step", 0),
            seconds=seconds,
            passed=passed,
            remark=remark,
        )
        if not passed:
            print(self.log(), file=sys.stderr)
        return row


def limit(cluster: VirtualCluster, folder: Path, target: str) -> Row:
    """Over a time limit to the end. srun's ranks are told by Slurm, torchrun's look at the clock themselves."""
    case = Case(cluster, folder, "limit", target, ENDLESS)
    asked = f"USR1@{STOP_SECONDS + 15}" if target == "slurm-native" else "B:USR1@1"
    case.submit(f"--time={LIMIT_MINUTES}", f"--signal={asked}")
    case.wait(lambda: cluster.job(case.job).get("Restarts") == "1")
    # However fast this machine is, it shall end in its second start.
    steps = case.status()["step"] + 100
    case.set_steps(steps)
    state = case.wait_for_end()
    starts = int(cluster.job(case.job).get("Restarts", 0)) + 1
    same = case.losses() == run_alone(case)
    complete = case.status().get("state") == "completed" and case.status().get("step") == steps
    events = [event for event in _events(case.run_dir) if event["kind"] == "stop"]
    stops = [event["text"].replace(str(case.run_dir), "RUN") for event in events]
    remark = f"losses {'equal to the bit' if same else 'DIFFER'}; stopped by: {'; '.join(_reasons(stops)) or 'nobody'}"
    return case.row(state == "COMPLETED" and starts > 1 and complete and same, remark)


def stop(cluster: VirtualCluster, folder: Path, target: str) -> Row:
    """To the steps under srun alone; to the batch script under torchrun, as `--signal=B:` does it."""
    case = Case(cluster, folder, "stop", target, ENDLESS)
    case.submit("--time=60")
    case.wait_for_step(20)
    where = ["--batch"] if target == "slurm" else []
    cluster.run("scancel", *where, "--signal=USR1", case.job)
    state = case.wait_for_end()
    time.sleep(10)  # a requeue would show by now
    again = cluster.job(case.job)
    preempted = case.status().get("state") == "preempted"
    once = again.get("JobState") == "COMPLETED" and again.get("Restarts") == "0"
    return case.row(state == "COMPLETED" and preempted and once, "saved, and not requeued" if once else "REQUEUED")


def kill(cluster: VirtualCluster, folder: Path, target: str) -> Row:
    """A rank dies without a word."""
    case = Case(cluster, folder, "kill", target, ENDLESS if target == "slurm-native" else 500)
    case.submit("--time=60")
    case.wait_for_step(210)  # behind the first checkpoint
    ranks = [one for one in psutil.process_iter(["cmdline"]) if _is_rank(one.info["cmdline"] or [], case.run_dir)]
    ranks[-1].kill()
    state = case.wait_for_end()
    if target == "slurm-native":
        return case.row(
            state == "FAILED" and case.status().get("state") == "failed", "every rank ended, the job failed"
        )
    passed = state == "COMPLETED" and case.status().get("state") == "completed"
    return case.row(passed, "torchrun started its ranks again, to the end")


def _is_rank(command: list[str], run_dir: Path) -> bool:
    """Not the agent, whose command holds that of its ranks."""
    agents = ("torch.distributed.run", "srun", "bash", "disttrain.launching.node")
    return f"run.dir={run_dir}" in command and not any(word.endswith(agents) for word in command)


def _events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def _reasons(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(text.partition(";")[0] for text in texts))


def run_alone(case: Case) -> dict[int, float]:
    """The losses of the same run on four processes of one machine, undisturbed."""
    run_dir = case.folder / "undisturbed"
    command = [sys.executable, "-m", "disttrain", "train", str(case.config), "--nproc", "4", f"run.dir={run_dir}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def campaign(only: str) -> list[Row]:
    rows: list[Row] = []
    # As many threads for a rank of a node with two as for one of four: bits depend on it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        state = folder / "cluster"
        state.mkdir()
        with virtual_cluster(state) as cluster:
            for target in ("slurm-native", "slurm"):
                scenarios: dict[str, Callable[[], Row]] = {
                    "stop": lambda target=target: stop(cluster, folder, target),  # type: ignore[misc]
                    "kill": lambda target=target: kill(cluster, folder, target),  # type: ignore[misc]
                    "limit": lambda target=target: limit(cluster, folder, target),  # type: ignore[misc]
                }
                for scenario, run in scenarios.items():
                    if only in ("", scenario):
                        rows.append(run())
                        print(*rows[-1], sep="  ", flush=True)
    return rows


def write_results(rows: list[Row], version: str) -> None:
    content = {"slurm": version, "rows": [row._asdict() for row in rows]}
    (RESULTS / "slurm.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = [
        f"# Under a real Slurm ({version}), two virtual nodes with two ranks each",
        "",
        "By `python benchmarks/slurm.py`; what each scenario is stands at its top.",
        "",
        "| scenario | target | job | starts | run | step | passed | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.scenario,
            row.target,
            row.job_state,
            row.starts,
            row.run_state,
            row.step,
            "yes" if row.passed else "NO",
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} | {row.remark} |")
    (RESULTS / "slurm.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=["limit", "stop", "kill"], help="one scenario; writes no results")
    options = parser.parse_args()
    if problem := missing_slurm():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    # A signal must leave no jobs and no daemons behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    rows = campaign(options.only)
    if not options.only:
        version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
        write_results(rows, version)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
