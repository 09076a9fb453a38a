from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.reporting.metrics import MetricsLog, read_metrics, truncate_after

ROOT = Path(__file__).resolve().parents[2]


def write_steps(path: Path, first: int, last: int) -> None:
    log = MetricsLog(path, first - 1)
    for step in range(first, last + 1):
        log.write(step, step * 64, {"loss/total": 1 / (step + 2), "optim/lr": 1e-4})
    log.close()


def test_full_precision_and_null_for_non_finite_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write(1, 8, {"loss/total": 0.1 + 0.2, "optim/gradient_norm": float("inf")})
    text = path.read_text()  # without close: each line is flushed
    assert text.endswith("\n") and text.count("\n") == 1
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"step": 1, "slot": 8, "loss/total": 0.1 + 0.2, "optim/gradient_norm": None}


@settings(max_examples=25, deadline=None)
@given(last=st.integers(0, 12), keep=st.integers(0, 14), torn=st.binary(max_size=30))
def test_a_truncated_log_continues_as_if_never_interrupted(
    tmp_path_factory: pytest.TempPathFactory, last: int, keep: int, torn: bytes
) -> None:
    folder = tmp_path_factory.mktemp("metrics")
    path, straight = folder / "metrics.jsonl", folder / "straight.jsonl"
    keep = min(keep, last)
    write_steps(path, 1, last)
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    truncate_after(path, keep)
    assert [record["step"] for record in read_metrics(path)] == list(range(1, keep + 1))
    write_steps(path, keep + 1, 12)
    write_steps(straight, 1, 12)
    assert path.read_bytes() == straight.read_bytes()
    assert {file.name for file in folder.iterdir()} == {"metrics.jsonl", "straight.jsonl"}


def test_torn_line_in_the_middle_of_the_last_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    path.write_bytes(path.read_bytes()[:-3])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    truncate_after(path, 3)
    assert path.read_text().count("\n") == 2 and path.read_text().endswith("}\n")


def test_truncating_a_complete_or_missing_file_does_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_after(path, 5)
    assert not path.exists()
    write_steps(path, 1, 4)
    inode = path.stat().st_ino
    truncate_after(path, 4)
    assert path.stat().st_ino == inode


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import itertools, pathlib, sys; from streamtrain.reporting.metrics import MetricsLog\n"
        "log = MetricsLog(pathlib.Path(sys.argv[1]), 0)\n"
        "for step in itertools.count(1): log.write(step, step, {'loss/total': 1 / step})\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    deadline = time.monotonic() + 30
    while (not path.exists() or path.stat().st_size < 20_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    steps = [record["step"] for record in read_metrics(path)]
    assert len(steps) > 100 and steps == list(range(1, len(steps) + 1))
