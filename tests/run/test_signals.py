"""Requests by signals and files, also while the process is inside a library call."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import ROOT

from streamtrain.run.signals import FIRST_STEP_SECONDS, SAVE_NAME, STOP_NAME

PROGRAM = """
import hashlib, sys, time
from pathlib import Path
from streamtrain.run.signals import Requests
requests = Requests(Path(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    if line == "stop_code\\n":
        print(requests.stop_code(), flush=True)
    elif line == "first step\\n":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    elif line == "busy\\n":
        requests.mark_step_completed()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    else:
        getattr(requests, line.strip())()
        print("done", flush=True)
"""


@contextmanager
def listening(folder: Path, rank: int = 0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(rank)], cwd=ROOT, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{word}\n")
    return process.stdout.readline().strip()


def wait_for_code(process: subprocess.Popen[str], code: int) -> None:
    deadline = time.monotonic() + 10
    while ask(process, "stop_code") != str(code):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [([signal.SIGTERM], 75), ([signal.SIGUSR1], 75), ([signal.SIGINT], 130), ([signal.SIGINT, signal.SIGTERM], 130)],
)
def test_signals_set_the_exit_code(numbers: list[signal.Signals], code: int, tmp_path: Path) -> None:
    with listening(tmp_path, rank=1) as process:
        assert ask(process, "stop_code") == "0"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)
        wait_for_code(process, code)


def test_a_second_interrupt_ends_a_busy_process(tmp_path: Path) -> None:
    with listening(tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write("busy\n")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_in_a_long_first_step_ends_the_process(number: signal.Signals, status: int, tmp_path: Path) -> None:
    """Without a checkpoint, because no step is complete; a later step is not interrupted."""
    with listening(tmp_path) as process, listening(tmp_path) as later:
        for each, word in ((process, "first step"), (later, "busy")):
            assert each.stdin is not None
            each.stdin.write(f"{word}\n")
        time.sleep(0.3)
        for each in (process, later):
            each.send_signal(number)
        assert process.wait(FIRST_STEP_SECONDS + 4) == status
        assert later.poll() is None


def test_a_first_step_that_ends_soon_is_saved(tmp_path: Path) -> None:
    with listening(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        wait_for_code(process, 75)
        assert ask(process, "mark_step_completed") == "done"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(FIRST_STEP_SECONDS + 1)


def test_rank_0_checks_for_request_files_and_removes_them(tmp_path: Path) -> None:
    save, stop = tmp_path / SAVE_NAME, tmp_path / STOP_NAME
    with listening(tmp_path, rank=1) as other:
        save.touch(), stop.touch()
        assert ask(other, "stop_code") == "0"
        ask(other, "remove_stop_file")
        assert stop.exists()
    stop.unlink()
    with listening(tmp_path) as process:
        assert ask(process, "stop_code") == "1"
        # a save that started before the file existed does not fulfil the request; one that starts now does
        ask(process, "mark_save_finished")
        assert save.exists()
        ask(process, "mark_save_started")
        assert ask(process, "stop_code") == "0" and save.exists()
        stop.touch()
        assert ask(process, "stop_code") == "75"
        ask(process, "mark_save_finished")
        assert not save.exists()
        ask(process, "remove_stop_file")
        assert not stop.exists() and ask(process, "stop_code") == "0"
