"""plan.py as it is used: in seconds, without torch, for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "plan.py"


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, cwd=ROOT)


EIGHT = ("--config", "giant.yaml", "--gpus", "8", "--gpu-memory", "80GB")
ONE = ("--config", "giant_1gpu.yaml", "--gpus", "1", "--gpu-memory", "141GB", "--host-memory", "128GB")


@pytest.mark.parametrize("arguments", [EIGHT, ONE], ids=["eight", "one"])
def test_the_giant_fits_and_the_arithmetic_is_shown(arguments: tuple[str, ...]) -> None:
    done = run_plan(*arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    *text, last = done.stdout.splitlines()
    document = json.loads(last)
    assert document["fits"] is True and document["num_parameters"] == 7_028_020_096
    for key in ("gpu_bytes", "host_bytes", "disk_bytes", "flops_per_step", "all_gather_bytes_per_step"):
        assert document[key] >= 0
    shown = "\n".join(text)
    assert "values of this rank x 4 B" in shown and "<- peak" in shown and "fits" in shown
    # each phase is the sum of its parts
    for phase, num_bytes in document["gpu_bytes_by_phase"].items():
        parts = [p for p in document["parts"] if p["place"] == "gpu" and {"always", phase} & set(p["when"])]
        assert num_bytes == sum(part["bytes"] for part in parts)


def test_it_takes_seconds_and_no_torch() -> None:
    code = f"import sys; sys.argv = {['plan.py', *EIGHT, '--fit']!r}\n"
    code += "import runpy\ntry:\n    runpy.run_path('tools/plan.py', run_name='__main__')\n"
    code += "except SystemExit as end:\n    assert not end.code\n"
    code += "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    began = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began[1] < 20  # a busy machine; alone it takes 2


def test_what_does_not_fit_is_said_and_mended() -> None:
    words = ("--config", "giant.yaml", "--gpus", "1", "--gpu-memory", "141GB", "--host-memory", "128GB")
    done = run_plan(*words)
    assert done.returncode == 1 and "does NOT fit" in done.stdout and "--fit" in done.stdout
    mended = run_plan(*words, "--fit", "--json")
    document = json.loads(mended.stdout.splitlines()[-1])
    assert mended.returncode == 0 and document["fits"]
    again = run_plan(*words, *document["overrides"])
    assert again.returncode == 0, again.stdout
    assert run_plan(*words[:5], "20GB", "--fit").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--config", "absent.yaml", *EIGHT[2:]), "no config"),
        ((*EIGHT, "model.dpeth=3"), "did you mean model.depth"),
        ((*EIGHT[:5], "eighty"), "must be a size"),
        ((*EIGHT, "data.micro_batch=7"), "not a multiple"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: tuple[str, ...], told: str) -> None:
    done = run_plan(*arguments)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
