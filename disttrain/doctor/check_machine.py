"""Is each machine fit for the run: limits, shared memory, disk, packages. From facts to findings, nothing else."""

from __future__ import annotations

from disttrain.doctor.facts import Node
from disttrain.doctor.finding import Finding, Severity
from disttrain.doctor.needs import Needs
from disttrain.doctor.words import rate, size, span

FILES_OF_A_PROCESS = 128
FILES_PER_PEER = 8
"""Connections of a process to each other one: every process group of a mesh has its own."""
THREADS_OF_A_PROCESS = 64
LOCKED_BYTES = 1 << 30
SHARED_BYTES_OF_A_GPU = 64 << 20
"""NCCL's buffers between the processes of a node; a container that nobody told otherwise has 64 MiB for all."""
SLOW_DISK = 50e6
SLOW_FSYNC_SECONDS = 0.1
FEW_FILES = 10_000
LEAST_FREE_BYTES = 1e9


def check_limits(node: Node, needs: Needs) -> list[Finding]:
    findings = [*_open_files(node, needs), *_processes(node, needs), *_locked_memory(node)]
    if findings:
        return findings
    files = node.limits.open_files
    return [Finding("ok", "limits", f"open files {files if files is not None else 'unlimited'}", (node.host,))]


def _open_files(node: Node, needs: Needs) -> list[Finding]:
    files, wanted = node.limits.open_files, FILES_OF_A_PROCESS + FILES_PER_PEER * needs.world
    if files is None or files >= 2 * wanted:
        return []
    what = (
        f"open files: {files} allowed, a process of this run needs about {wanted} "
        f"({FILES_OF_A_PROCESS} + {FILES_PER_PEER} x {needs.world} processes)"
    )
    remedy = f"ulimit -n {max(65_536, 4 * wanted)} before the start; docker: --ulimit nofile"
    figures = {"open_files": files, "needed": wanted}
    return [Finding("breaks" if files < wanted else "warning", "limits", what, (node.host,), remedy, figures)]


def _processes(node: Node, needs: Needs) -> list[Finding]:
    limit, used = node.limits.processes, node.limits.processes_used or 0
    wanted = THREADS_OF_A_PROCESS * needs.nproc
    if limit is None or limit - used >= 2 * wanted:
        return []
    what = (
        f"processes: {limit} allowed, {used} there, so {limit - used} left; {needs.nproc} processes of this run "
        f"with their threads need about {wanted}"
    )
    figures = {"processes": limit, "processes_used": used, "needed": wanted}
    remedy = f"raise ulimit -u, or the container's pids limit, to {used + 4 * wanted} or more"
    severity: Severity = "breaks" if limit - used < wanted else "warning"
    return [Finding(severity, "limits", what, (node.host,), remedy, figures)]


def _locked_memory(node: Node) -> list[Finding]:
    """Only InfiniBand locks memory, and then all that it sends from."""
    locked, devices = node.limits.locked_bytes, node.network.infiniband
    if locked is None or not devices or locked >= LOCKED_BYTES:
        return []
    what = f"locked memory: {size(locked)} allowed, and {devices[0]} must lock what it sends (ibv_reg_mr would fail)"
    remedy = "ulimit -l unlimited (Slurm: PropagateResourceLimitsExcept=MEMLOCK; containers: --ulimit memlock=-1)"
    return [Finding("breaks", "limits", what, (node.host,), remedy, {"locked_bytes": locked})]


def check_shared_memory(node: Node, needs: Needs) -> list[Finding]:
    memory, where = node.shared_memory, (node.host,)
    larger = "give the container more: docker --shm-size=8g, Kubernetes: an emptyDir with medium: Memory at /dev/shm"
    if memory.total_bytes is None or memory.error:
        what = f"/dev/shm: {memory.error or 'is not there'}; locks between processes live there"
        return [Finding("breaks", "shared memory", what, where, "mount a tmpfs at /dev/shm, mode 1777")]
    figures = {"total_bytes": memory.total_bytes, "free_bytes": memory.free_bytes}
    wanted = SHARED_BYTES_OF_A_GPU * needs.nproc
    free = f"/dev/shm: {size(memory.free_bytes)} of {size(memory.total_bytes)} free"
    if memory.free_bytes >= 2 * wanted:
        return [Finding("ok", "shared memory", free, where, figures=figures)]
    gpus = bool(node.gpus.cards or node.gpus.seen) and needs.device != "cpu"
    what = f"{free}; {needs.nproc} processes with NCCL may want {size(wanted)} ({needs.nproc} x 64 MiB)"
    severity: Severity = "note" if not gpus else "breaks" if memory.free_bytes < wanted else "warning"
    return [Finding(severity, "shared memory", what, where, larger, figures)]


def check_disk(node: Node, needs: Needs) -> list[Finding]:
    disk, where = node.disk, (node.host,)
    place = f"{disk.folder}: "
    if disk.error is not None or disk.free_bytes is None:
        what = f"{place}{disk.error or 'nothing is known of it'}"
        return [Finding("breaks", "disk", what, where, "check permissions and mounts, or set run.dir elsewhere")]
    figures = {
        "free_bytes": disk.free_bytes,
        "write_bytes_per_second": disk.write_bytes_per_second,
        "fsync_seconds": disk.fsync_seconds,
    }
    findings = [*_room(node, needs), *_speed(node, needs)]
    if findings:
        return [Finding(f.severity, f.check, f.what, f.where, f.remedy, figures | dict(f.figures)) for f in findings]
    speed = f", writes {rate(disk.write_bytes_per_second)}" if disk.write_bytes_per_second else ""
    sync = f", fsync {span(disk.fsync_seconds)}" if disk.fsync_seconds is not None else ""
    return [Finding("ok", "disk", f"{place}{size(disk.free_bytes)} free{speed}{sync}", where, figures=figures)]


def _room(node: Node, needs: Needs) -> list[Finding]:
    disk, where = node.disk, (node.host,)
    free = disk.free_bytes or 0
    one = needs.checkpoint_bytes or LEAST_FREE_BYTES
    all_of_them = one * (needs.checkpoints_kept + 1)  # the next one is written before the oldest goes
    findings = []
    if free < all_of_them:
        of = f" ({needs.checkpoints_kept} + 1 checkpoints of about {size(one)})" if needs.checkpoint_bytes else ""
        what = f"{disk.folder}: {size(free)} free, and a run wants {size(all_of_them)}{of}"
        remedy = "free space, lower checkpoint.keep_last, or set run.dir to a larger disk"
        severity: Severity = "breaks" if free < one else "warning"
        figures = {"needed_bytes": all_of_them}
        findings.append(Finding(severity, "disk", what, where, remedy, figures))
    if disk.free_files is not None and disk.free_files < FEW_FILES:
        what = f"{disk.folder}: room for {disk.free_files} more files (inodes), whatever their size"
        few: Severity = "breaks" if disk.free_files < 100 else "warning"
        findings.append(Finding(few, "disk", what, where, "remove small files, or set run.dir elsewhere"))
    return findings


def _speed(node: Node, needs: Needs) -> list[Finding]:
    disk, where = node.disk, (node.host,)
    speed, sync = disk.write_bytes_per_second, disk.fsync_seconds
    findings = []
    if speed is not None and needs.checkpoint_bytes is not None and needs.checkpoint_bytes > needs.stop_seconds * speed:
        seconds = needs.checkpoint_bytes / speed
        what = (
            f"{disk.folder}: a checkpoint of about {size(needs.checkpoint_bytes)} at {rate(speed)} from one node takes "
            f"{span(seconds)}, and the last one has {needs.stop_seconds:g} s before the job ends"
        )
        remedy = "raise resilience.stop_before_limit_seconds, or set run.dir to a faster disk"
        findings.append(Finding("warning", "disk", what, where, remedy, {"checkpoint_seconds": seconds}))
    elif speed is not None and speed < SLOW_DISK:
        what = f"{disk.folder}: writes {rate(speed)} until they are safe; checkpoints will hold up the run"
        findings.append(Finding("warning", "disk", what, where, "set run.dir to a faster disk"))
    if sync is not None and sync > SLOW_FSYNC_SECONDS:
        what = f"{disk.folder}: {span(sync)} until 4 kB are safe (fsync)"
        findings.append(Finding("warning", "disk", what, where, "set run.dir to a faster disk, or ask who loads it"))
    return findings


def check_packages(node: Node, needs: Needs) -> list[Finding]:
    packages, where = node.packages, (node.host,)
    findings = [
        Finding("breaks", "packages", problem, where, "disttrain train would refuse to start")
        for problem in packages.problems
    ]
    if packages.wandb_error is not None:
        what = f"W&B: {packages.wandb_server} cannot be reached: {packages.wandb_error}; the run would go offline"
        remedy = "open the way (proxy, WANDB_BASE_URL), or set monitor.wandb.mode=offline and `wandb sync` later"
        findings.append(Finding("warning", "packages", what, where, remedy))
    if "torch" not in node.versions:
        findings.append(Finding("breaks", "packages", "torch is not installed", where, "pip install disttrain"))
    return findings
