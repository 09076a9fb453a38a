"""The job files in ``examples``. tests/cluster runs them: under a real Slurm, and the command of the container."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ranks import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def documents() -> list[Any]:
    return list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("version", ["1.29", "1.31", "1.34", kubernetes_validate.latest_version()])
def test_kubernetes_knows_every_field(version: str, documents: list[Any]) -> None:
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_parts_of_the_kubernetes_job_fit_together(documents: list[Any]) -> None:
    service, job = documents
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["NODES"] == str(spec["completions"]) == str(spec["parallelism"])
    # as the comments say
    assert spec["backoffLimit"] == 5 * spec["completions"]
    # the name that an indexed job gives its first pod
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    paths = [word.partition("=")[2] for word in container["args"] if "=" in word]
    assert len(paths) == 2 and all(any(path.startswith(f"{place}/") for place in places) for path in paths)
    # exit statuses of the command
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert rules == {"FailJob": [2, 3], "Ignore": [75]}
    assert {rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"][:2]} == {
        container["name"]
    }


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_scripts_can_be_parsed(documents: list[Any]) -> None:
    assert subprocess.run(["bash", "-n", EXAMPLES / "slurm.sbatch"]).returncode == 0
    command = documents[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["bash", "-c"] and subprocess.run(["bash", "-n", "-c", command[2]]).returncode == 0
