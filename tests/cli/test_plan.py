"""``streamtrain plan``: in seconds, without torch, as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from commands import ENVIRONMENT, run_command
from ranks import ROOT


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command("plan", *arguments)


EIGHT = ("--config", "giant.yaml", "--gpus", "8", "--gpu-memory", "80GB")
ONE = ("--config", "giant_1gpu.yaml", "--gpus", "1", "--gpu-memory", "141GB", "--host-memory", "128GB")


@pytest.mark.parametrize("arguments", [EIGHT, ONE], ids=["eight", "one"])
def test_giant_recipe_fits_and_its_arithmetic_is_printed(arguments: tuple[str, ...]) -> None:
    done = run_plan(*arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    *text, last = done.stdout.splitlines()
    document = json.loads(last)
    assert document["fits"] is True and document["num_parameters"] == 7_028_020_096
    for key in ("gpu_bytes", "host_bytes", "disk_bytes", "flops_per_step", "all_gather_bytes_per_step"):
        assert document[key] >= 0
    shown = "\n".join(text)
    assert "values of this rank x 4 B" in shown and "<- peak" in shown and "fits" in shown
    # the bytes of a phase are the sum of its parts
    for phase, num_bytes in document["gpu_bytes_by_phase"].items():
        parts = [p for p in document["parts"] if p["place"] == "gpu" and {"always", phase} & set(p["when"])]
        assert num_bytes == sum(part["bytes"] for part in parts)


def test_plan_takes_seconds_and_does_not_import_torch() -> None:
    code = f"import sys; from streamtrain.cli.main import main; assert main({['plan', *EIGHT, '--fit']!r}) == 0\n"
    code += "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 20  # 2 s on an idle machine


def test_fit_finds_settings_where_the_recipe_does_not_fit() -> None:
    words = ("--config", "giant.yaml", "--gpus", "1", "--gpu-memory", "141GB", "--host-memory", "128GB")
    done = run_plan(*words)
    assert done.returncode == 1 and "does NOT fit" in done.stdout and "--fit" in done.stdout
    fitted = run_plan(*words, "--fit", "--json")
    document = json.loads(fitted.stdout.splitlines()[-1])
    assert fitted.returncode == 0 and document["fits"]
    again = run_plan(*words, *document["overrides"])
    assert again.returncode == 0, again.stdout
    assert run_plan(*words[:5], "20GB", "--fit").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "absent.yaml", *EIGHT[2:]), "no config"),
        ((*EIGHT, "model.dpeth=3"), "did you mean model.depth"),
        ((*EIGHT[:5], "eighty"), "is not a size"),
        ((*EIGHT, "data.micro_batch=7"), "not a multiple"),
    ],
)
def test_an_error_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run_plan(*arguments)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
