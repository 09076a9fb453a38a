"""Every file-system call may fail: jobs end as documented, and the next run gives what an undisturbed one gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled ``fs_shim.c``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    library = tmp_path_factory.mktemp("shim") / "fs_shim.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "fs_shim.c", "-ldl"], check=True)
    return library


def fail_calls(shim: Path, job: str, folder: Path, injections: int) -> dict[str, int]:
    """Run ``every_call.py``; return its counts and assert that nothing was violated."""
    environment = {
        **os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = [sys.executable, HERE / "every_call.py", job, folder, str(injections), "0"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=4 * 3600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    *violations, last = done.stdout.splitlines()
    assert not violations, "\n".join(violations)
    print(last)
    return dict(json.loads(last))


@pytest.mark.parametrize(
    ("job", "injections"),
    [("pack", 15), pytest.param("train", 2, marks=pytest.mark.slow), pytest.param("cached", 1, marks=pytest.mark.slow)],
)
def test_some_failing_calls(shim: Path, job: str, injections: int, tmp_path: Path) -> None:
    assert fail_calls(shim, job, tmp_path / "job", injections)["injections"] == injections


@pytest.mark.slow
@pytest.mark.parametrize("job", ["pack", "train", "cached"])
def test_each_kind_of_failing_call(shim: Path, job: str, tmp_path: Path) -> None:
    assert fail_calls(shim, job, tmp_path / "job", 0)["calls"] > 100
