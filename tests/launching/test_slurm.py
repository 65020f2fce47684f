"""Real Slurm looks at the scripts (`sbatch --test-only`): a virtual cluster of two nodes, up in seconds.

Jobs that run, meet their time limit and are requeued: `benchmarks/slurm.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.testing.virtual_slurm import VirtualCluster, missing_slurm, virtual_cluster
from tests.launching.rendered import ROOT, text_of

pytestmark = [
    pytest.mark.skipif(bool(missing_slurm()), reason=missing_slurm() or "Slurm is here"),
    pytest.mark.timeout(120),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with virtual_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def dry_run(slurm: VirtualCluster, folder: Path, target: str, **wishes: object) -> tuple[int, str]:
    script = folder / "script.sbatch"
    script.write_text(text_of(target, 'device="cpu"', **wishes))
    said = slurm.run("sbatch", "--test-only", str(script))
    return said.returncode, said.stderr


@pytest.mark.parametrize("target", ["slurm", "slurm-native"])
def test_slurm_takes_the_script(slurm: VirtualCluster, tmp_path: Path, target: str) -> None:
    code, said = dry_run(slurm, tmp_path, target, partition="main", time="1-00:00:00", memory="500M")
    assert (code, "to start at" in said and "on nodes n[1-2]" in said) == (0, True), said
    code, said = dry_run(slurm, tmp_path, target, exclude=["n1"], nodes=1)
    assert (code, "on nodes n2" in said) == (0, True), said


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"nodes": 4}, "Requested node configuration is not available"),
        ({"partition": "gpu"}, "invalid partition"),
        ({"exclude": ["n1"]}, "Requested node configuration is not available"),
        ({"sbatch": ["--no-such-option"]}, "unrecognized option"),
    ],
)
def test_slurm_looks_closely(slurm: VirtualCluster, tmp_path: Path, wishes: dict[str, object], said: str) -> None:
    """The test above would be worth nothing otherwise."""
    code, answer = dry_run(slurm, tmp_path, "slurm", **wishes)
    assert code != 0
    assert said in answer
