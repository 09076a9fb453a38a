"""The acceptance script keeps a result of each part, continues where it stopped, and runs on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT
from ranks import ROOT

from tools.gpu_acceptance import (
    Part,
    files_of_gpu_tests,
    giant_settings,
    matching_option,
    parts,
    plan,
    predict,
    run_all,
    run_part,
)


def python(code: str, seconds: float = 30, name: str = "part") -> Part:
    return Part(name, [sys.executable, "-c", code], seconds)


def test_parts_have_results_and_are_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    chosen = [
        python("print('x'); print('{\"speed\": 3}')", name="good"),
        python("import sys; print('why'); sys.exit(3)", name="bad"),
        python("import time; print('begun', flush=True); time.sleep(60)", 1, name="slow"),
        python(f"open({str(tmp_path / 'count')!r}, 'a').write('1')", name="silent"),
    ]
    first = run_all(chosen[:2], path, {"card": "none"}, 5)
    assert first["card"] == "none" and first["parts"]["good"]["result"] == {"speed": 3}
    for _ in range(2):
        document = run_all(chosen, path, {}, 5)
        assert document == json.loads(path.read_text())
    records = document["parts"]
    assert [records[part.name]["status"] for part in chosen] == [0, 3, -9, 0]
    assert records["bad"]["lines"] == ["why"] and records["slow"]["lines"] == ["begun", "ended after 1 s"]
    assert (tmp_path / "count").read_text() == "1" and records["silent"]["lines"] == []


def test_a_part_that_may_take_too_long_is_left_for_the_next_call(tmp_path: Path) -> None:
    chosen = [python("", 1, name="short"), python("", 500, name="long")]
    assert list(run_all(chosen, tmp_path / "result.json", {}, 1)["parts"]) == ["short"]
    assert list(run_all(chosen, tmp_path / "result.json", {}, 9)["parts"]) == ["short", "long"]


H200_BYTES = 150_000_000_000


@pytest.mark.parametrize("cpu", [True, False])
def test_parts_fit_into_calls_of_a_few_minutes(cpu: bool, tmp_path: Path) -> None:
    chosen = list(parts(tmp_path, cpu, H200_BYTES, tmp_path / "result.json"))
    assert len({part.name for part in chosen}) == len(chosen) >= 10
    # with time to start
    assert all(0 < part.seconds <= 7.5 * 60 for part in chosen)
    for part in chosen:
        # files of this checkout, whatever is installed
        assert all(Path(ROOT, word).exists() for word in part.words if word.startswith(("tools/", "tests/")))


def test_gpu_tests_are_found_without_importing_all_tests() -> None:
    files = files_of_gpu_tests()
    assert "tests/data/test_pipeline.py" in files and len(files) < 15


def test_the_7b_network_runs_where_the_plan_finds_settings() -> None:
    settings = giant_settings(H200_BYTES)
    # the host memory of this machine decides which
    if settings is not None:
        planned = plan(["--config", "giant.yaml", *settings])
        assert planned is not None and planned["gpu_bytes"] < H200_BYTES
    assert giant_settings(20_000_000_000) is None


def test_steps_that_do_not_fit_the_gpu_are_skipped() -> None:
    part = Part("step", [sys.executable, "-c", "raise SystemExit(1)"], 30, ["--config", "vits16.yaml"])
    record = run_part(part, 1_000_000_000)
    assert record["status"] == 0 and record["skipped"].startswith("needs ")
    assert run_part(part, H200_BYTES)["status"] == 1


@pytest.mark.parametrize(
    ("card", "option"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA Z1", None),
    ],
)  # fmt: skip
def test_a_card_has_the_most_specific_option_of_the_plan(card: str, option: str | None) -> None:
    assert matching_option(card, {"h100", "h100pcie", "h200", "h20", "a100", "a10", "rtx4090"}) == option


def test_prediction_compares_steps_with_the_plan_of_their_settings() -> None:
    settings = ["--config", "vits16.yaml", "data.micro_batch=32", "data.global_batch=null"]
    document = {
        "card": "NVIDIA H200", "gpu_bytes": H200_BYTES,
        "parts": {
            "step": {"planned": settings, "result": {"step_seconds": 0.1}},
            "training": {
                "planned": settings,
                "result": {"step_seconds": 0.2, "planned_peak_bytes": 30, "measured_peak_bytes": 20},
            },
            "failed": {"planned": settings, "lines": ["error"]},
            "loader": {"result": {"images_per_second": 3.0}},
        },
    }  # fmt: skip
    compared = predict(document)
    assert list(compared) == ["step", "training"]
    planned = plan([*settings, "--device", "gpu"], "NVIDIA H200")
    assert planned is not None
    assert compared["step"]["seconds_ratio"] == pytest.approx(planned["step_seconds"] / 0.1)
    assert compared["training"]["bytes_ratio"] == 1.5 and "bytes_ratio" not in compared["step"]


@pytest.mark.slow
def test_the_parts_run_on_a_cpu(tmp_path: Path) -> None:
    words = ["tools/gpu_acceptance.py", "--cpu", "--out", tmp_path / "result.json", "--work", tmp_path / "work"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert records["training, vitl16"]["result"]["ratio"] > 0
    assert records["decoder"]["result"]["failures"] == []
    assert records["profile of vitl16"]["result"]["largest"][0]["seconds"] > 0
    assert records["prediction"]["result"]["step, vitl16, batch 2"]["seconds_ratio"] > 0
    assert records["step, vitl16, batch 2"]["result"]["images_per_second"] > 0
