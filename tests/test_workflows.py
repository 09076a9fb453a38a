"""The workflow for GPU runners: its commands exist, and it runs no code of forks."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from ranks import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "gpu.yml"


@pytest.fixture
def workflow() -> dict[Any, Any]:
    document: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    return document


def test_every_command_of_the_workflow_exists(workflow: dict[Any, Any]) -> None:
    commands = [shlex.split(step["run"]) for step in workflow["jobs"]["gpu"]["steps"] if "run" in step]
    assert len(commands) == 3
    scripts = [word for words in commands for word in words if word.startswith("tools/")]
    assert scripts == ["tools/setup_env.sh", "tools/gpu_acceptance.py"]
    assert all((ROOT / script).exists() for script in scripts)
    help_text = subprocess.run(
        [ROOT / "tools" / "setup_env.sh", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "test" in help_text and ".venv" in help_text
    options = {word for words in commands for word in words if word.startswith("--")}
    source = (ROOT / "tools" / "gpu_acceptance.py").read_text(encoding="utf-8")
    assert options == {"--minutes", "--out"} and all(f'"{option}"' in source for option in options)
    # a registered marker
    assert '"gpu: ' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    uploaded = next(step["with"]["path"] for step in workflow["jobs"]["gpu"]["steps"] if "path" in step.get("with", {}))
    assert uploaded in commands[-1]


def test_code_of_forks_never_runs(workflow: dict[Any, Any]) -> None:
    # PyYAML reads the key "on" as true
    events = workflow[True]
    assert set(events) == {"workflow_dispatch", "pull_request"} and events["pull_request"] == {"types": ["labeled"]}
    job = workflow["jobs"]["gpu"]
    conditions = [" ".join(part.split()) for part in job["if"].split("||")]
    assert conditions == [
        "github.event_name == 'workflow_dispatch'",
        "(github.event.label.name == 'gpu' && github.event.pull_request.head.repo.full_name == github.repository)",
    ]
    assert job["runs-on"] == ["self-hosted", "gpu"] and workflow["permissions"] == {"contents": "read"}
    # an expression in a command could run foreign text, such as the name of a branch
    text = WORKFLOW.read_text(encoding="utf-8")
    assert not any("${{" in step.get("run", "") for step in job["steps"]) and "secrets." not in text
    assert not re.search(r"^\s*pull_request_target:", text, re.MULTILINE)
