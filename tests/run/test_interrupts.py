"""Ctrl-C and SIGTERM end a command at any moment with one line, and leave no process behind."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import COMMAND, ENVIRONMENT
from drawn_images import draw_folder, packed_set
from ranks import ROOT
from tiny_run import command

from streamtrain.run.command_line import MAX_DESCRIPTORS, raise_descriptor_limit

START = """
from streamtrain.run import interrupts
interrupts.GRACE_SECONDS = 0.5
interrupts.end_quietly_on_interrupt()
interrupts.raise_on_interrupt()
"""
# programs that would ignore the exception, and the line that each prints when it is ready
STUBBORN = {
    "library call": "import hashlib; print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "dropped exception": """
print('ready', flush=True)
while True:
    try:
        import time; time.sleep(60)
    except BaseException:
        pass
""",
    "destructor": """
import time
class Slow:
    def __del__(self):
        print('ready', flush=True)
        while True: time.sleep(0.01)
Slow()
time.sleep(60)
""",
    "process": "import subprocess, hashlib; subprocess.Popen(['sleep', '47.11']); print('ready', flush=True)\n"
    "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}


@pytest.fixture(autouse=True)
def default_interrupts() -> Iterator[None]:
    """Let the commands of these tests receive Ctrl-C, which a shell ignores in jobs of the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def handles_signals(process: subprocess.Popen[str]) -> bool:
    """Return whether the process has installed its handlers; Python itself handles only SIGINT."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def session(process: subprocess.Popen[str]) -> list[str]:
    """Return the commands of the processes that are still running in the session of ``process``."""
    words = ["ps", "-o", "stat=,args=", "-s", str(process.pid)]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if not line.startswith("Z")]


def interrupt(words: list[str], number: signal.Signals, seconds: float, cwd: Path) -> tuple[int, str]:
    """Start a command, send a signal after ``seconds``, and return its exit status and stderr."""
    process = subprocess.Popen(
        words, cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not handles_signals(process):
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        deadline = time.monotonic() + 10
        while session(process) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert session(process) == []
    finally:
        process.kill()
    return process.returncode, "\n".join(line for line in errors.splitlines() if " elapsed, " not in line)


@pytest.mark.parametrize("kind", STUBBORN)
def test_a_process_that_does_not_react_is_ended(kind: str) -> None:
    code = START + STUBBORN[kind]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)  # until it is inside the call
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not session(process)


def test_a_second_signal_ends_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", START.replace("0.5", "60.0") + STUBBORN["library call"]], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130


def test_handlers_are_restored() -> None:
    from streamtrain.run.interrupts import exit_on_interrupt, raise_on_interrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    for install in (raise_on_interrupt, exit_on_interrupt):
        undo = install()
        assert [signal.getsignal(number) for number in numbers] != before
        undo()
        assert [signal.getsignal(number) for number in numbers] == before
        assert signal.set_wakeup_fd(-1) == -1


def cases(folder: Path) -> dict[str, list[str]]:
    tools = [sys.executable, str(ROOT / "tools")]
    run = command("set", folder / "run", "run.steps=100000")[1:]
    return {
        "verify": [*COMMAND, "verify", "set", "--workers", "2"],
        "pack": [tools[0], f"{tools[1]}/make_shards.py", "--src", "images", "--out", "other", "--workers", "2"],
        "evaluate": [*COMMAND, "evaluate", "knn", "--train", "images", "--untrained", "--config", "vits16.yaml"],
        "demo": [tools[0], f"{tools[1]}/make_demo_images.py", "--out", "demo", "--workers", "2"],
        "bench": [tools[0], f"{tools[1]}/bench.py", "order", "--samples", "1e12", "--repeats", "100000"],
        "train": [*COMMAND, "train", *run],
        "ranks": [*COMMAND, "train", "--ranks", "2", *run],
        "main": [sys.executable, *command("set", folder / "run", "run.steps=100000")],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupts")
    packed_set(folder, 60, ("a", "b"))
    draw_folder(folder / "images", 4000, ("a", "b"))
    return folder


def check(status: int, errors: str, number: signal.Signals, name: str) -> None:
    assert "Traceback" not in errors
    if status == 0:
        return  # it was faster
    stops = name in ("train", "ranks", "main")
    # `python -m` ends as killed, which a shell shows as 130 too, if the signal came during exec of a string, such as
    # for a dataclass
    status = 130 if status == -signal.SIGINT else status
    assert status == (75 if stops and number == signal.SIGTERM else 130), errors
    lines = [line for line in errors.splitlines() if not line.startswith(("warning: ", "step "))]
    # ranks that receive SIGTERM report nothing; a run that has started logs to stdout
    assert len(lines) <= 1 and (lines or stops), errors
    assert all(line.startswith(("interrupted", "stopped")) for line in lines), errors


@pytest.mark.parametrize("name", ["pack", "evaluate", "demo", "bench", "ranks"])
def test_a_signal_during_the_start_is_one_line(name: str, folder: Path) -> None:
    number = signal.SIGINT if name != "bench" else signal.SIGTERM
    check(*interrupt(cases(folder)[name], number, 0.4, folder), number, name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", list(cases(Path())))
def test_a_signal_at_any_moment_is_one_line(name: str, number: signal.Signals, folder: Path) -> None:
    draw = random.Random(name)
    for _ in range(15):
        check(*interrupt(cases(folder)[name], number, draw.uniform(0, 8), folder), number, name)


def test_the_limit_of_open_files_is_raised() -> None:
    code = (
        "import resource, sys; soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "from streamtrain.cli.main import main\n"
        "main(['config', '--explain', 'run.dir'])\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    words = [sys.executable, "-c", code]
    ended = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    expected = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    assert ended.stdout.splitlines()[-1] == str(expected), ended.stderr


def test_a_limit_that_cannot_be_raised_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_descriptor_limit()
