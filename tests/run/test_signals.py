"""What is asked of a run by signals and by files, in a process that is busy in a library and runs no Python."""

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

from streamtrain.run.signals import SAVE_NAME, STOP_NAME

PROGRAM = """
import hashlib, sys, time
from pathlib import Path
from streamtrain.run.signals import Requests
requests = Requests(Path(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    if line == "code\\n":
        print(requests.stop_code(), flush=True)
    elif line == "busy\\n":
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


def told(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{word}\n")
    return process.stdout.readline().strip()


def code_becomes(process: subprocess.Popen[str], code: int) -> None:
    deadline = time.monotonic() + 10
    while told(process, "code") != str(code):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [([signal.SIGTERM], 75), ([signal.SIGUSR1], 75), ([signal.SIGINT], 130), ([signal.SIGINT, signal.SIGTERM], 130)],
)
def test_a_signal_is_an_exit_status(numbers: list[signal.Signals], code: int, tmp_path: Path) -> None:
    with listening(tmp_path, rank=1) as process:
        assert told(process, "code") == "0"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)
        code_becomes(process, code)


def test_a_second_interrupt_ends_a_process_that_waits_for_others(tmp_path: Path) -> None:
    with listening(tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write("busy\n")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


def test_files_ask_rank_0_and_go_when_it_is_done(tmp_path: Path) -> None:
    save, stop = tmp_path / SAVE_NAME, tmp_path / STOP_NAME
    with listening(tmp_path, rank=1) as other:
        save.touch(), stop.touch()
        assert told(other, "code") == "0"
        told(other, "stopped")
        assert stop.exists()
    stop.unlink()
    with listening(tmp_path) as process:
        assert told(process, "code") == "1"
        # a save that began before the file came does not count, one that begins now is the one
        told(process, "saved")
        assert save.exists()
        told(process, "saving")
        assert told(process, "code") == "0" and save.exists()
        stop.touch()
        assert told(process, "code") == "75"
        told(process, "saved")
        assert not save.exists()
        told(process, "stopped")
        assert not stop.exists() and told(process, "code") == "0"
