"""Limits, shared memory, disk and packages: facts broken one by one, and the real things broken where a process can."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.config.model import ModelConfig
from disttrain.doctor.check_machine import check_disk, check_limits, check_packages, check_shared_memory
from disttrain.doctor.facts import Disk, Gpus, Limits, Network, Package, SharedMemory
from disttrain.doctor.machine import gather_disk, gather_limits, gather_shared_memory
from disttrain.doctor.needs import Needs, parameters
from tests.cli.helpers import ROOT, environment
from tests.doctor.made_up import healthy, only

EIGHT = Needs(nodes=2, nproc=8)


def test_a_healthy_machine_is_well() -> None:
    for check in (check_limits, check_shared_memory, check_disk):
        (finding,) = check(healthy(), EIGHT)
        assert (finding.severity, finding.where, finding.remedy) == ("ok", ("a",), "")
    assert check_packages(healthy(), EIGHT) == []


@pytest.mark.parametrize(("files", "severity"), [(255, "breaks"), (256, "warning"), (511, "warning"), (512, "ok")])
def test_open_files_for_the_world(files: int, severity: str) -> None:
    """128 + 8 x 16 processes = 256."""
    (finding,) = check_limits(healthy(limits=Limits(open_files=files)), EIGHT)
    assert finding.severity == severity
    if severity != "ok":
        assert "128 + 8 x 16 processes" in finding.what
        assert "ulimit -n" in finding.remedy


@pytest.mark.parametrize(("used", "severity"), [(3_500, "breaks"), (3_400, "warning"), (100, "ok")])
def test_processes_that_are_left(used: int, severity: str) -> None:
    limits = Limits(open_files=65_536, processes=4_000, processes_used=used)
    assert check_limits(healthy(limits=limits), EIGHT)[0].severity == severity


def test_infiniband_locks_memory() -> None:
    limits = Limits(open_files=65_536, locked_bytes=64 << 10)
    assert check_limits(healthy(limits=limits), EIGHT)[0].severity == "ok"
    found = only(check_limits(healthy(limits=limits, network=Network(infiniband=("mlx5_0",))), EIGHT))
    assert "65.5 kB allowed, and mlx5_0" in found.what


def test_the_usual_container_has_too_little_shared_memory() -> None:
    docker = SharedMemory(total_bytes=64 << 20, free_bytes=64 << 20)
    assert "8 x 64 MiB" in only(check_shared_memory(healthy(shared_memory=docker), EIGHT)).what
    assert "shm-size" in only(check_shared_memory(healthy(shared_memory=docker), Needs(nproc=1)), "warning").remedy
    # gloo does without.
    only(check_shared_memory(healthy(shared_memory=docker, gpus=Gpus()), EIGHT), "note")
    gone = SharedMemory(error="No such file or directory")
    only(check_shared_memory(healthy(shared_memory=gone, gpus=Gpus()), EIGHT))


@pytest.mark.parametrize(
    ("disk", "severity", "said"),
    [
        ({"free_bytes": 11 * 10**9}, "breaks", "11.0 GB free, and a run wants 36.0 GB (2 + 1 checkpoints"),
        ({"free_bytes": 35 * 10**9}, "warning", "36.0 GB"),
        ({"free_files": 50}, "breaks", "50 more files"),
        ({"free_files": 5000}, "warning", "5000 more files"),
        ({"error": "Read-only file system"}, "breaks", "/runs: Read-only file system"),
        ({"write_bytes_per_second": 40e6}, "warning", "takes 300 s, and the last one has 120 s"),
        ({"fsync_seconds": 0.5}, "warning", "500 ms until 4 kB are safe"),
    ],
)
def test_disks_that_will_not_do(disk: dict[str, float | str], severity: str, said: str) -> None:
    needs = Needs(checkpoint_bytes=12 * 10**9, checkpoints_kept=2)
    broken = healthy().disk.model_copy(update=disk)
    assert said in only(check_disk(healthy(disk=broken), needs), severity).what


def test_without_a_config_a_disk_needs_little() -> None:
    full, few = ({"free_bytes": size} for size in (5 * 10**8, 15 * 10**8))
    only(check_disk(healthy(disk=healthy().disk.model_copy(update=full)), Needs()))
    only(check_disk(healthy(disk=healthy().disk.model_copy(update=few)), Needs()), "warning")
    slow = healthy().disk.model_copy(update={"write_bytes_per_second": 10e6})
    assert "10.0 MB/s" in only(check_disk(healthy(disk=slow), Needs()), "warning").what


def test_packages() -> None:
    broken = Package(problems=("monitor.wandb.mode: no wandb",), wandb_server="w:443", wandb_error="no answer")
    findings = check_packages(healthy(packages=broken, versions={}), EIGHT)
    assert [finding.severity for finding in findings] == ["breaks", "warning", "breaks"]
    assert "would go offline" in findings[1].what


def test_parameters_of_gpt2() -> None:
    """124 million, of which biases and norms are a thousandth."""
    model = ModelConfig(n_layers=12, d_model=768, n_heads=12, vocab_size=50_257)
    assert abs(parameters(model, 1024) / 124_439_808 - 1) < 2e-3


def test_what_this_process_may_do() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert gather_limits().open_files == soft
    code = "from disttrain.doctor.machine import gather_limits; print(gather_limits().open_files)"
    command = f'ulimit -n 100; exec "{sys.executable}" -c "{code}"'
    done = subprocess.run(
        ["sh", "-c", command], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "100\n"


def test_the_container_counts_processes(tmp_path: Path) -> None:
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "pids.max").write_text("500\n")
    (folder / "pids.current").write_text("450\n")
    assert (gather_limits(tmp_path).processes, gather_limits(tmp_path).processes_used) == (500, 450)
    (folder / "pids.max").write_text("max\n")
    assert gather_limits(tmp_path).processes != 500


def test_a_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    disk = gather_disk(tmp_path / "runs" / "new")
    assert disk.folder == str(tmp_path)
    assert disk.error is None
    assert disk.fsync_seconds is not None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert gather_disk(tmp_path / "file").error == "not a folder"
    assert gather_shared_memory(tmp_path / "nowhere").error == "No such file or directory"


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_a_small_disk_and_a_small_dev_shm(tmp_path: Path) -> None:
    """Mounted in a mount namespace of the child's own, which goes with it."""
    code = (
        "from pathlib import Path; from disttrain.doctor.machine import gather_disk, gather_shared_memory;"
        f"print(gather_disk(Path('{tmp_path}')).model_dump_json()); print(gather_shared_memory().model_dump_json())"
    )
    mounts = f"mount -t tmpfs -o size=1m none {tmp_path} && mount -t tmpfs -o size=64k none /dev/shm"
    command = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "{sys.executable}" -c "{code}"']
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip(f"this container may not mount: {done.stderr.strip()}")
    disk, memory = done.stdout.splitlines()
    small = Disk.model_validate_json(disk)
    assert (small.free_bytes, small.write_bytes_per_second) == (1 << 20, None)
    only(check_disk(healthy(disk=small), EIGHT))
    only(check_shared_memory(healthy(shared_memory=SharedMemory.model_validate_json(memory)), EIGHT))
