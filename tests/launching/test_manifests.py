"""The manifests against strict schemas: a field that nobody knows is a mistake, as a server may drop it in silence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.launching.rendered import ROOT, text_of

yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra [test]")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema comes with the extra [test]")

SCHEMAS = Path(__file__).parent / "schemas"
KINDS = {
    "k8s-jobset": ["JobSet"],
    "k8s-job": ["Service", "Job"],
    "k8s-trainjob": ["TrainingRuntime", "TrainJob"],
    "k8s-pytorchjob": ["PyTorchJob"],
}
EVERYTHING: dict[str, Any] = {
    "image": "registry/disttrain:1",
    "claim": "scratch",
    "exclude": ["n3"],
    "env": ["WANDB_MODE=offline", "QUOTED=a \"b\" 'c'"],
    "memory": "64Gi",
    "cpus": 3,
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def problems(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


def kubernetes_problems(document: dict[str, Any]) -> list[str]:
    schema = json.loads((SCHEMAS / "kubernetes.json").read_text())
    return problems(document, schema | {"$ref": f"#/$defs/{document['kind']}"})


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod's specification, wherever it lies."""
    if "containers" in document:
        yield document
    for inner in document.values():
        for one in inner if isinstance(inner, list) else [inner]:
            if isinstance(one, dict):
                yield from pods(one)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("wishes", [{}, {"nodes": 4, **EVERYTHING}], ids=["plain", "everything"])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_fields_are_known(target: str, wishes: dict[str, Any], device: str) -> None:
    documents = list(yaml.safe_load_all(text_of(target, f'device="{device}"', "run.name=GPT_2", **wishes)))
    assert [document["kind"] for document in documents] == KINDS[target]
    assert [kubernetes_problems(document) for document in documents] == [[] for _ in documents]


@pytest.mark.parametrize("target", [*KINDS, "skypilot"])
@pytest.mark.parametrize("name", ["true", "null", "1e5"])
def test_names_stay_words(target: str, name: str) -> None:
    """YAML reads them as something else where nobody quotes them."""
    documents = list(yaml.safe_load_all(text_of(target, f'run.name="{name}"')))
    names = [document.get("name") or document["metadata"]["name"] for document in documents]
    assert set(map(type, names)) == {str}
    if target != "skypilot":
        assert [kubernetes_problems(document) for document in documents] == [[] for _ in documents]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda jobset: jobset["spec"]["replicatedJobs"][0]["template"]["spec"].update(completionMod="Indexed"),
        lambda jobset: jobset["spec"].update(failurPolicy={}),
        lambda jobset: next(pods(jobset)).pop("containers"),
        lambda jobset: next(pods(jobset))["containers"][0]["resources"].update(requests={"cpu": "many"}),
        lambda jobset: next(pods(jobset)).update(terminationGracePeriodSeconds="150"),
        lambda jobset: jobset["metadata"].update(name="Upper_case"),
    ],
)
def test_the_schemas_can_fail(change: Change) -> None:
    document = yaml.safe_load(text_of("k8s-jobset"))
    broken = deepcopy(document)
    change(broken)
    assert kubernetes_problems(document) == []
    assert len(kubernetes_problems(broken)) >= 1


@pytest.mark.parametrize("target", KINDS)
def test_what_a_pod_needs(target: str) -> None:
    """Time to save, shared memory, a place that outlives it, and the container name that operators look for."""
    documents = list(yaml.safe_load_all(text_of(target, "resilience.stop_before_limit_seconds=200", **EVERYTHING)))
    (pod,) = [pod for document in documents for pod in pods(document)]
    assert pod["terminationGracePeriodSeconds"] == 230
    (container,) = pod["containers"]
    assert container["name"] == ("pytorch" if target == "k8s-pytorchjob" else "node")
    assert container["command"][container["command"].index("--stop") + 1] == "200"
    assert container["command"][-1] == "run.dir=/workspace/runs/quickstart"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["/workspace/runs"]["persistentVolumeClaim"] == {"claimName": "scratch"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert variables["QUOTED"] == "a \"b\" 'c'"
    assert ("PET_MASTER_ADDR" in variables) == (target in ("k8s-jobset", "k8s-job"))  # Kubeflow says it itself


def test_pods_of_a_plain_job_find_their_head() -> None:
    """By the name that the headless service gives to the pod with index 0: JOB-0.SUBDOMAIN."""
    service, job = yaml.safe_load_all(text_of("k8s-job", "run.name=GPT_2"))
    (pod,) = pods(job)
    name = job["metadata"]["name"]
    assert (service["metadata"]["name"], service["spec"]["clusterIP"]) == (pod["subdomain"], "None")
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["containers"][0]["env"][1]["value"] == f"{name}-0.{pod['subdomain']}" == "gpt-2-0.gpt-2"


def test_an_elastic_pytorchjob() -> None:
    job = yaml.safe_load(text_of("k8s-pytorchjob", min_nodes=1))["spec"]
    assert (job["elasticPolicy"]["minReplicas"], job["elasticPolicy"]["maxReplicas"]) == (1, 2)
    command = next(pods(job))["containers"][0]["command"]
    assert command[command.index("--nnodes") + 1] == "1:2"


@pytest.mark.parametrize("wishes", [{}, {"env": ["A=b c"], "image": "x:1", "accelerators": "A100:8", "claim": "mine"}])
def test_skypilots_task(wishes: dict[str, Any], tmp_path: Path) -> None:
    task = yaml.safe_load(text_of("skypilot", setup=["pip install -e .", "make data"], **wishes))
    assert problems(task, json.loads((SCHEMAS / "skypilot.json").read_text())) == []
    assert task["num_nodes"] == 2
    assert task["setup"] == "pip install -e .\nmake data\n"
    assert task["resources"]["accelerators"] == wishes.get("accelerators", "H100:2")
    script = tmp_path / "run.sh"
    script.write_text(f"#!/usr/bin/env bash\n{task['run']}")
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize(("nodes", "nproc", "kind"), [(2, 2, "MULTI_GPU"), (1, 1, "NO")])
def test_accelerates_config(nodes: int, nproc: int, kind: str) -> None:
    settings = yaml.safe_load(text_of("accelerate", nodes=nodes, nproc=nproc))
    assert problems(settings, json.loads((SCHEMAS / "accelerate.json").read_text())) == []
    assert (settings["num_machines"], settings["num_processes"]) == (nodes, nodes * nproc)
    assert settings["distributed_type"] == kind


def test_the_image_has_what_the_manifests_name() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "WORKDIR /workspace\n" in text
    assert "COPY configs configs\n" in text
    copied = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == allowed
    assert all(os.path.lexists(ROOT / name) for name in copied)
