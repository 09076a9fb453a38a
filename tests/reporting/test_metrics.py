from __future__ import annotations

import json
import math
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


def test_a_stride_keeps_the_lines_with_collapse_metrics(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 11):
        log.write(step, step, {"watch/collapse": 0.0} if step in (5, 8) else {"loss/total": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl", 4)] == [1, 5, 8, 9]


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


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.just(10**400) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.just(b"[" * 100_000),
            st.dictionaries(st.text(max_size=4) | st.just("step"), VALUES).map(
                lambda value: json.dumps(value).encode()
            ),
        ),
        max_size=5,
    ),
    keep=st.integers(0, 3),
)
def test_no_content_of_the_file_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], keep: int
) -> None:
    path = tmp_path_factory.mktemp("noise") / "metrics.jsonl"
    write_steps(path, 1, 2)
    with path.open("ab") as file:
        file.write(b"\n".join([*lines, b'{"step": 3, "slot": 7, "a\\u001b": 2, "b": NaN, "c": [1]}', b'{"step": 4']))
    records = list(read_metrics(path))
    assert {1, 2, 3} <= {record["step"] for record in records}
    for record in records:
        assert all(tag.isprintable() and type(value) in (int, float, type(None)) for tag, value in record.items())
        assert all(value is None or math.isfinite(value) for value in record.values())
    truncate_after(path, keep)
    kept = [record["step"] for record in read_metrics(path)]
    assert all(step <= keep for step in kept) and set(range(1, keep + 1)) <= set(kept)
    write_steps(path, keep + 1, 5)
    assert set(range(1, 6)) <= {record["step"] for record in read_metrics(path)}


def test_skipped_lines_are_counted_but_not_a_torn_last_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    with path.open("ab") as file:
        file.write(b'{"step"')
    assert len(list(read_metrics(path))) == 3 and not caplog.records
    with path.open("ab") as file:
        file.write(b"\n" + b"x" * 3_000_000 + b"\n")
    assert len(list(read_metrics(path))) == 3 and "2 invalid lines" in caplog.text
