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
    parts,
    plan,
    predict,
    read_result,
    run_all,
    run_part,
)


def python(code: str, seconds: float = 30, name: str = "part") -> Part:
    return Part(name, [sys.executable, "-c", code], seconds)


NO_CARD = {"card": "none", "gpu_bytes": 0}


def test_parts_have_results_and_only_failed_ones_are_repeated(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    chosen = [
        python("print('x'); print('{\"speed\": 3}')", name="good"),
        python("import sys; print('why'); sys.exit(3)", name="bad"),
        python("import time; print('begun', flush=True); time.sleep(60)", 1, name="slow"),
        python(f"open({str(tmp_path / 'count')!r}, 'a').write('1')", name="silent"),
    ]
    first = run_all(chosen[:2], path, NO_CARD, {"commit": "a"}, 5)
    assert first["card"] == "none" and first["parts"]["good"]["result"] == {"speed": 3}
    for commit in ("b", "c"):
        document = run_all(chosen, path, {}, {"commit": commit}, 5)
        assert document == json.loads(path.read_text())
    records = document["parts"]
    # each part has the commit of its last run
    assert [records[part.name]["program"]["commit"] for part in chosen] == ["a", "c", "c", "b"]
    assert [records[part.name]["status"] for part in chosen] == [0, 3, -9, 0]
    assert records["bad"]["lines"] == ["why"] and records["slow"]["lines"] == ["begun", "ended after 1 s"]
    assert (tmp_path / "count").read_text() == "1" and records["silent"]["lines"] == []


def test_a_part_that_may_take_too_long_is_left_for_the_next_call(tmp_path: Path) -> None:
    chosen = [python("", 1, name="short"), python("", 500, name="long")]
    assert list(run_all(chosen, tmp_path / "result.json", NO_CARD, {}, 1)["parts"]) == ["short"]
    assert list(run_all(chosen, tmp_path / "result.json", {}, {}, 9)["parts"]) == ["short", "long"]


def test_a_part_that_fails_again_does_not_keep_others_from_running(tmp_path: Path) -> None:
    chosen = [python("raise SystemExit(1)", 50, name="bad"), python("", 50, name="good")]
    run_all(chosen[:1], tmp_path / "result.json", NO_CARD, {}, 1)
    # time for one of them
    assert "good" in run_all(chosen, tmp_path / "result.json", {}, {}, 50.02 / 60)["parts"]


def test_the_reason_of_a_failed_part_with_json_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run_part(python('print(\'{"failures": ["odd.png differs"]}\'); raise SystemExit(1)'))
    assert "   odd.png differs\n" in capsys.readouterr().out


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/gpu_acceptance.py", *words]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("minutes", ["-3", "7.9", "nan"])
def test_a_call_lasts_8_minutes_or_more(minutes: str) -> None:
    done = run_script("--cpu", "--minutes", minutes)
    assert done.returncode == 2 and done.stderr.startswith("error: --minutes must be at least 8")


@pytest.mark.parametrize("content", [None, "", "[]", '{"parts": {}}', '{"card": "x", "gpu_bytes": 0, "parts": [1]}'])
def test_a_file_that_is_no_result_is_an_error_of_one_line(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=f"error: {path} is not a result of this script"):
        read_result(path)


def test_predict_of_a_missing_file_has_no_traceback(tmp_path: Path) -> None:
    done = run_script("--predict", str(tmp_path / "absent.json"))
    assert done.returncode == 1 and done.stderr == f"error: {tmp_path}/absent.json is not a result of this script\n"


def test_a_closed_output_ends_the_script_quietly() -> None:
    # the pipe is closed before the script writes
    command = f"{sys.executable} tools/gpu_acceptance.py --cpu --list | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "0\n" and done.stderr == ""


H200_BYTES = 150_000_000_000


@pytest.mark.parametrize("cpu", [True, False])
def test_parts_fit_into_calls_of_a_few_minutes(cpu: bool, tmp_path: Path) -> None:
    chosen = list(parts(tmp_path, cpu, H200_BYTES, "NVIDIA H200", tmp_path / "result.json"))
    assert len({part.name for part in chosen}) == len(chosen) >= 10
    # with time to start
    assert all(0 < part.seconds <= 7.5 * 60 for part in chosen)
    for part in chosen:
        # files of this checkout, whatever is installed
        assert all(Path(ROOT, word).exists() for word in part.words if word.startswith(("tools/", "tests/")))


def test_steps_in_fp8_run_on_gpus_that_have_it(tmp_path: Path) -> None:
    for card, is_expected in (("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False), ("NVIDIA Z1", True)):
        names = [part.name for part in parts(tmp_path, False, H200_BYTES, card, tmp_path / "result.json")]
        assert ("step, vitl16, fp8" in names) == is_expected


def test_gpu_tests_are_found_without_importing_all_tests() -> None:
    files = files_of_gpu_tests()
    assert "tests/data/test_pipeline.py" in files and len(files) < 15


def test_the_7b_network_runs_where_the_plan_finds_settings() -> None:
    settings = giant_settings(H200_BYTES, "NVIDIA H200")
    # the host memory of this machine decides which
    if settings is not None:
        planned = plan(["--config", "giant.yaml", *settings])
        assert planned is not None and planned["gpu_bytes"] < H200_BYTES
    assert giant_settings(20_000_000_000, "NVIDIA RTX 4090") is None


def test_steps_that_do_not_fit_the_gpu_are_skipped() -> None:
    part = Part("step", [sys.executable, "-c", "raise SystemExit(1)"], 30, ["--config", "vits16.yaml"])
    record = run_part(part, 1_000_000_000)
    assert record["status"] == 0 and record["skipped"].startswith("needs ")
    assert run_part(part, H200_BYTES)["status"] == 1


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
