"""What the root's `launch/` holds, by the arguments that write it."""

from __future__ import annotations

from pathlib import Path

from disttrain.launching.files import job_files
from disttrain.launching.job import check_job
from disttrain.launching.wishes import Wishes

ROOT = Path(__file__).parents[2]
CONFIG = Path("configs/quickstart.toml")

WRITTEN = {
    "torchrun.sh": ("torchrun", 1),
    "multinode.sh": ("torchrun", 2),
    "slurm.sbatch": ("slurm", 2),
    "slurm-native.sbatch": ("slurm-native", 2),
    "k8s/trainjob.yaml": ("k8s-trainjob", 2),
    "k8s/pytorchjob.yaml": ("k8s-pytorchjob", 2),
    "k8s/jobset.yaml": ("k8s-jobset", 2),
    "k8s/job.yaml": ("k8s-job", 2),
    "skypilot.yaml": ("skypilot", 2),
    "accelerate.yaml": ("accelerate", 2),
    "deepspeed.sh": ("deepspeed", 2),
}
"""Target and nodes of each file, two processes a node."""
SCRIPTS = ("torchrun.sh", "multinode.sh", "slurm.sbatch", "slurm-native.sbatch", "deepspeed.sh")


def command(file: str) -> str:
    target, nodes = WRITTEN[file]
    return f"disttrain launch --target {target} {CONFIG} --nodes {nodes} --nproc 2 --output launch/{file}"


def files_of(target: str, *overrides: str, config: Path = CONFIG, **wishes: object) -> dict[str, str]:
    """Rendered in memory; two nodes with two processes unless said otherwise. To be called in the root."""
    wanted = Wishes(**{"nodes": 2, "nproc": 2} | wishes)  # type: ignore[arg-type]
    return job_files(check_job(target, config, overrides, wanted))


def text_of(target: str, *overrides: str, **wishes: object) -> str:
    return next(iter(files_of(target, *overrides, **wishes).values()))  # type: ignore[arg-type]
