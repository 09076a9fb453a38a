"""The acceptance script keeps a result of each part, continues where it stopped, and runs on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT
from ranks import ROOT

from tools.gpu_acceptance import GIANT_BYTES, Part, parts, run_all


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


@pytest.mark.parametrize("cpu", [True, False])
def test_parts_fit_into_calls_of_a_few_minutes(cpu: bool, tmp_path: Path) -> None:
    chosen = list(parts(tmp_path, cpu, GIANT_BYTES))
    assert len({part.name for part in chosen}) == len(chosen) > 8
    assert all(0 < part.seconds <= 8 * 60 for part in chosen)


@pytest.mark.slow
def test_the_parts_run_on_a_cpu(tmp_path: Path) -> None:
    words = ["tools/gpu_acceptance.py", "--cpu", "--out", tmp_path / "result.json", "--work", tmp_path / "work"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert records["memory against plan"]["result"]["ratio"] > 0
    assert records["step, vitl16, batch 2"]["result"]["images_per_second"] > 0
