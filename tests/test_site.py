"""The documentation builds as a site without a warning, and its generated pages are current."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import streamtrain

ROOT = Path(__file__).resolve().parents[1]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every page is in the navigation, links and their anchors exist, and the API has the functions' docstrings."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(streamtrain.__all__) - {"__version__"}:
        assert f'id="streamtrain.{name}"' in page, f"{name} is missing from docs/api.md"


def test_generated_pages_are_current() -> None:
    command = [sys.executable, "tools/generate_docs.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_results_state_their_command_and_hardware() -> None:
    """Every file of benchmarks/results has the facts that a reader needs to repeat it."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"command", "commit", "hardware"} <= set(result), path.name
        if "rows" in result:
            assert {"title", "n", "spread"} <= set(result), path.name
            assert {len(row) for row in result["rows"]} == {len(result["columns"])}, path.name
