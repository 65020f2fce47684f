"""The files of a job for each target, from the templates beside this module. No torch here."""

from __future__ import annotations

import json
import re
import shlex
import zlib
from collections.abc import Callable, Sequence

from disttrain.launching.job import SIGNAL_SECONDS, VOLUMES, Job
from disttrain.launching.rendering import render
from disttrain.launching.wishes import KUBERNETES, SLURM

MAX_RESTARTS = 3
"""How often torchrun starts ranks again on the nodes it has."""
IMAGE = "disttrain:latest"
CLAIM = "disttrain-runs"
TIME = "1-00:00:00"

_FIRST_PORT, _PORTS = 20_000, 10_000
"""Below the ports that systems give out by themselves (from 32768 on), wide enough to keep jobs apart."""


def job_files(job: Job) -> dict[str, str]:
    """Name and content of each file that the target needs, the one to start or submit first."""
    return _BUILDERS[job.target](job)


def train_command(job: Job) -> list[str]:
    """What starts training on this machine alone."""
    return ["train", str(job.path), *job.overrides, "--nproc", str(job.nproc)]


def _torchrun(job: Job) -> dict[str, str]:
    if job.nodes == 1:
        return {"torchrun.sh": render("torchrun.sh", _common(job))}
    values = {**_common(job), "default_head": job.wishes.head}
    return {"multinode.sh": render("multinode.sh", values)}


def _slurm(job: Job) -> dict[str, str]:
    template = f"{job.target}.sbatch"
    values = {**_common(job), **_slurm_values(job)}
    return {template: render(template, {**values, "verdict": render("slurm-verdict.sh", values)})}


def _kubernetes(job: Job) -> dict[str, str]:
    kind = job.target.removeprefix("k8s-")
    return {f"{kind}.yaml": render(f"{kind}.yaml", _pod_values(job))}


def _skypilot(job: Job) -> dict[str, str]:
    accelerators = job.wishes.accelerators or (f"H100:{job.nproc}" if job.gpus else "")
    values = {
        "quoted_name": json.dumps(job.name),
        "runs": str(VOLUMES[job.target]),
        "claim": json.dumps(job.wishes.claim or CLAIM),
        "image": f"image_id: {json.dumps(f'docker:{job.wishes.image}')}" if job.wishes.image else "",
        "accelerators": f"accelerators: {accelerators}" if accelerators else "",
        "envs": _yaml_map(job.env),
        "envs_key": "envs:" if job.env else "",
        "setup": "\n".join(job.wishes.setup or ("pip install -e .",)),
        "run_dir": shlex.quote(job.volume_run_dir),
    }
    return {"skypilot.yaml": render("skypilot.yaml", {**_common(job), **values})}


def _deepspeed(job: Job) -> dict[str, str]:
    hosts = "".join(f"node-{index} slots={job.nproc}\n" for index in range(job.nodes))
    exclude = f"--exclude {shlex.quote('@'.join(job.exclude))}" if job.exclude else ""
    values = {**_common(job), "exclude": _continued([exclude])}
    if job.nodes == 1:
        # With a hostfile the launcher would go to this machine over ssh too.
        alone = {"about": "", "check": "", "hosts": f"--num_nodes 1 --num_gpus {job.nproc}"}
        return {"deepspeed.sh": render("deepspeed.sh", values | alone)}
    about = f"#\n#   HOSTFILE  a line `NAME slots={job.nproc}` for each node, the head first; default: hostfile"
    several = {"about": about, "check": render("deepspeed-hostfile.sh", values), "hosts": '--hostfile "$hostfile"'}
    return {"deepspeed.sh": render("deepspeed.sh", values | several), "hostfile.example": hosts}


def _accelerate(job: Job) -> dict[str, str]:
    port = _FIRST_PORT + zlib.crc32(job.name.encode()) % _PORTS
    values = {**_common(job), "port": str(port), "head": job.wishes.head or "127.0.0.1"}
    values["distributed_type"] = "MULTI_GPU" if job.nodes * job.nproc > 1 else '"NO"'
    return {"accelerate.yaml": render("accelerate.yaml", values)}


_BUILDERS: dict[str, Callable[[Job], dict[str, str]]] = {
    "torchrun": _torchrun,
    **dict.fromkeys(SLURM, _slurm),
    **dict.fromkeys(KUBERNETES, _kubernetes),
    "skypilot": _skypilot,
    "deepspeed": _deepspeed,
    "accelerate": _accelerate,
}


def _common(job: Job) -> dict[str, str]:
    nodes = str(job.nodes) if job.min_nodes == job.nodes else f"{job.min_nodes} to {job.nodes}"
    return {
        "name": job.name,
        "size": f"{_counted(nodes, 'node')} with {_counted(str(job.nproc), 'process')} each",
        "run_dir": shlex.quote(str(job.config.run_dir)),
        "check_run_dir": render("run-dir.sh", {}),
        "nodes": str(job.nodes),
        "min_nodes": str(job.min_nodes),
        "nnodes": str(job.nodes) if job.min_nodes == job.nodes else f"{job.min_nodes}:{job.nodes}",
        "nproc": str(job.nproc),
        "world": str(job.nodes * job.nproc),
        "restarts": str(MAX_RESTARTS),
        "stop": str(job.stop_seconds),
        "first_port": str(_FIRST_PORT),
        "ports": str(_PORTS),
        "arguments": " ".join(shlex.quote(one) for one in (str(job.path), *job.overrides)),
    }


def _counted(number: str, noun: str) -> str:
    return f"{number} {noun}" if number == "1" else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def _slurm_values(job: Job) -> dict[str, str]:
    wishes = job.wishes
    native = job.target == "slurm-native"
    lines = [
        ("account", wishes.account),
        ("partition", wishes.partition),
        ("qos", wishes.qos),
        ("time", wishes.time or TIME),
        ("cpus-per-task", str(job.cpus_per_process * (1 if native else job.nproc))),
        # Not --gpus-per-task: a rank that sees one GPU only cannot reach its neighbours directly.
        ("gpus-per-node", str(job.nproc) if job.gpus else ""),
        ("mem", wishes.memory),
        ("exclude", ",".join(job.exclude)),
    ]
    own = [f"--{name}={value}" for name, value in lines if value]
    own += ["--no-kill"] if job.min_nodes < job.nodes else []
    container = [
        f"--container-image={shlex.quote(wishes.container)}",
        '--container-mounts="$PWD:$PWD"',
        '--container-workdir="$PWD"',
    ]
    setup = [*(f"module load {shlex.quote(one)}" for one in wishes.modules), *wishes.setup]
    setup += [f"export {name}={shlex.quote(value)}" for name, value in job.env]
    elastic = job.min_nodes < job.nodes
    return {
        "slurm_nodes": f"{job.min_nodes}-{job.nodes}" if elastic else str(job.nodes),
        # An elastic job goes on when a node fails; any other is better off in the queue again.
        "on_failure": "--no-kill --kill-on-bad-exit=0" if elastic else "--kill-on-bad-exit=1",
        "job_name": re.sub(r"[^A-Za-z0-9._-]", "-", job.name),
        "tasks": str(job.nproc if native else 1),
        "directives": "\n".join(f"#SBATCH {one}" for one in [*own, *wishes.sbatch]),
        "signal": str(job.stop_seconds + SIGNAL_SECONDS),
        "near": str(job.stop_seconds + 240),
        "setup": "\n".join(setup),
        "container": _continued(container if wishes.container else []),
        "default_head": wishes.head or '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    }


def _pod_values(job: Job) -> dict[str, str]:
    """Parts that all Kubernetes manifests share, and what differs by job."""
    wishes, name = job.wishes, kubernetes_name(job.name)
    resources = [("nvidia.com/gpu", str(job.nproc))] if job.gpus else []
    cpus = [("cpu", str(job.cpus_per_process * job.nproc)), *([("memory", wishes.memory)] if wishes.memory else [])]
    # Kubeflow tells its pods where the head is; to those of a bare JobSet or Job we say it.
    first = {"k8s-jobset": f"{name}-node-0-0.{name}", "k8s-job": f"{name}-0.{name}"}.get(job.target)
    head = [("PET_MASTER_ADDR", first), ("PET_MASTER_PORT", str(_FIRST_PORT))] if first else []
    values = {
        **_common(job),
        "name": name,
        # Names such as true or 1.5 are no words in YAML.
        "quoted_name": json.dumps(name),
        "image": json.dumps(wishes.image or IMAGE),
        "claim": json.dumps(wishes.claim or CLAIM),
        "runs": str(VOLUMES[job.target]),
        # After SIGTERM the agent waits for its ranks as long as they may take; only then comes SIGKILL.
        "grace": str(job.stop_seconds + 30),
        "failures": str(10 * job.nodes),
        "requests": _yaml_map([*cpus, *resources]),
        "limits": _yaml_map(resources),
        "limits_key": "limits:" if resources else "",
        "env": "\n".join(f"- name: {key}\n  value: {json.dumps(value)}" for key, value in [*head, *job.env]),
        "train": "\n".join(
            f"- {json.dumps(one)}" for one in (str(job.path), *job.overrides, f"run.dir={job.volume_run_dir}")
        ),
        "affinity": render("affinity.yaml", {"nodes": _yaml_list(job.exclude)}) if job.exclude else "",
    }
    for part in ("command", "container", "volumes"):
        values[part] = render(f"pod-{part}.yaml", values)
    return values


def kubernetes_name(name: str) -> str:
    """A name that Kubernetes takes for a job whose pods get `-node-0-0` behind it (a label of at most 63)."""
    clean = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (clean if clean[:1].isalpha() else f"run-{clean}")[:40].rstrip("-")


def _continued(options: Sequence[str]) -> str:
    """Options of a command over several lines of a script."""
    return "\n".join(f"{one} \\" for one in options if one)


def _yaml_map(items: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in items)


def _yaml_list(items: Sequence[str]) -> str:
    return "\n".join(f"- {json.dumps(one)}" for one in items)
