"""disttrain launch: write what starts a run on a cluster, or start it. Starts without torch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from disttrain.errors import UserError
from disttrain.launching.files import job_files, train_command
from disttrain.launching.job import Job, check_job
from disttrain.launching.wishes import SLURM, TARGETS, Wishes

_SLURM, _PODS = "Slurm", "Kubernetes and SkyPilot"


def _option(text: str, *names: str, panel: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


def launch_command(
    config: Annotated[Path, typer.Argument(help="A TOML file, or the folder of a run to continue.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    target: Annotated[str, _option(f"One of {', '.join(TARGETS)}.")] = "local",
    nodes: Annotated[int, _option("Nodes.")] = 1,
    nproc: Annotated[int | None, _option("Processes on each node (default: train.nproc).")] = None,
    min_nodes: Annotated[int | None, _option("Go on with as few nodes, where the target can.")] = None,
    output: Annotated[Path | None, _option("Write it to this file and start nothing.")] = None,
    dry_run: Annotated[bool, _option("Print what would be started or submitted.", "--dry-run")] = False,
    head: Annotated[str, _option("Address of the first node, where nobody else says it.")] = "",
    env: Annotated[list[str] | None, _option("NAME=VALUE for the job; may come again.")] = None,
    exclude: Annotated[list[str] | None, _option("Nodes not to use: names, or a file with one a line.")] = None,
    cpus: Annotated[int | None, _option("CPUs for each process.")] = None,
    memory: Annotated[str, _option("Memory of each node, such as 64G (Kubernetes: 64Gi).")] = "",
    account: Annotated[str, _option("Account.", panel=_SLURM)] = "",
    partition: Annotated[str, _option("Partition.", panel=_SLURM)] = "",
    qos: Annotated[str, _option("Quality of service.", panel=_SLURM)] = "",
    time: Annotated[str, _option("Time limit of one start (default: a day).", panel=_SLURM)] = "",
    module: Annotated[list[str] | None, _option("Module to load; may come again.", panel=_SLURM)] = None,
    setup: Annotated[list[str] | None, _option("Shell line before the start; may come again.", panel=_SLURM)] = None,
    sbatch: Annotated[list[str] | None, _option("Any other option of sbatch; may come again.", panel=_SLURM)] = None,
    container: Annotated[str, _option("Image for srun's --container-image (pyxis).", panel=_SLURM)] = "",
    image: Annotated[str, _option("Image of the pods (see Dockerfile).", panel=_PODS)] = "",
    claim: Annotated[str, _option("Volume claim for runs and checkpoints.", panel=_PODS)] = "",
    accelerators: Annotated[str, _option("SkyPilot's words for the GPUs, such as H100:8.", panel=_PODS)] = "",
) -> None:
    """Write the script or manifest that starts a run on a cluster; start it here (local) or submit it (slurm)."""
    if target not in TARGETS:
        raise UserError(f"--target {target!r}: must be one of {', '.join(TARGETS)}")
    wishes = Wishes(
        nodes=nodes,
        nproc=nproc,
        min_nodes=min_nodes,
        head=head,
        account=account,
        partition=partition,
        qos=qos,
        time=time,
        container=container,
        modules=module or (),
        setup=setup or (),
        sbatch=sbatch or (),
        env=env or (),
        exclude=exclude or (),
        image=image,
        claim=claim,
        accelerators=accelerators,
        cpus=cpus,
        memory=memory,
    )
    job = check_job(target, config, overrides or (), wishes)
    if target == "local":
        _local(job, output, dry_run)
    else:
        sys.exit(_cluster(job, output, dry_run))


def _local(job: Job, output: Path | None, dry_run: bool) -> None:
    """`disttrain train` in this place, whose exit code is ours."""
    if output is not None:
        raise UserError("--output: local starts here and writes nothing; use --target torchrun for a script")
    command = train_command(job)
    if dry_run:
        print(shlex.join(["disttrain", *command]))
    else:
        os.execv(sys.executable, [sys.executable, "-m", "disttrain", *command])


def _cluster(job: Job, output: Path | None, dry_run: bool) -> int:
    files = job_files(job)
    main = next(iter(files))
    if output is not None:
        _write(files, output)
        return 0
    if job.target in SLURM and not dry_run:
        return _submit(job, files[main])
    sys.stdout.write(files[main])
    return 0


def _submit(job: Job, script: str) -> int:
    """sbatch reads the script from us; a copy lies in the run folder, for whoever asks later what was started."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on PATH: submit from a login node of the cluster, or write the script with --output FILE "
            "(--dry-run prints it)"
        )
    copy = job.config.run_dir / f"{job.target}.sbatch"
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(script, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{copy}: {error.strerror}; set run.dir to a folder that all nodes share") from None
    return subprocess.run(["sbatch"], input=script, text=True).returncode


def _write(files: dict[str, str], output: Path) -> None:
    """The first file under the name that was asked for, others beside it; scripts may be executed."""
    main, *others = files
    places = {output: files[main], **{output.parent / name: files[name] for name in others}}
    for place, text in places.items():
        try:
            place.write_text(text, encoding="utf-8")
            if text.startswith("#!"):
                place.chmod(place.stat().st_mode | 0o111)
        except OSError as error:
            raise UserError(f"--output {place}: {error.strerror}; name a file in a folder that is there") from None
        print(f"wrote {place}", file=sys.stderr)
