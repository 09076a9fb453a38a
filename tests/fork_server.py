"""Start Python programs as forks of a process that has imported torch, DeepSpeed and streamtrain.

Such a program starts in a fraction of a second instead of the seconds of the imports. It has the arguments, environment
and working directory of a new process, but not its own hash seed, nor proof that its imports are complete: tests of the
command line, of launchers and of signals during the start use new processes.

As a script, this is the server: ``fork_server.py SOCKET`` forks a keeper per request, which forks the program, waits
for it and sends its exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

PRELOADED = (
    "numpy", "PIL.Image", "torch", "deepspeed", "torch.utils.tensorboard", "streamtrain.training.loop",
    "streamtrain.interop.load",
)  # fmt: skip

# of this process at its start, which no test has changed
ENVIRONMENT = dict(os.environ)


class ForkedProcess:
    """A program of the server, with the part of the interface of ``subprocess.Popen`` that tests use."""

    def __init__(self, status: socket.socket, stdout: IO[str], stderr: IO[str]) -> None:
        self._status, self.stdout, self.stderr = status, stdout, stderr
        self.returncode: int | None = None
        self.pid = self._receive()

    def _receive(self) -> int:
        data = self._status.recv(4, socket.MSG_WAITALL)
        if len(data) < 4:
            raise RuntimeError("the fork server has ended")
        return int.from_bytes(data, "little", signed=True)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = self._receive()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of the process and return its stdout and stderr; call it once."""
        end = None if timeout is None else time.monotonic() + timeout
        texts = ["", ""]

        def read(number: int, file: IO[str]) -> None:
            texts[number] = file.read()

        files = enumerate((self.stdout, self.stderr))
        threads = [threading.Thread(target=read, args=each, daemon=True) for each in files if not each[1].closed]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        self.wait(None if end is None else max(0.1, end - time.monotonic()))
        self.stdout.close(), self.stderr.close()
        return texts[0], texts[1]


class ForkServer:
    """The server of this process, which ends with it."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
        # pipes, as the programs get; its own few lines, such as a warning of DeepSpeed, are of no test
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())], env=environment, pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        other.close()
        atexit.register(self.close)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, words: Sequence[object], environment: Mapping[str, str], cwd: Path | None = None) -> ForkedProcess:
        """Start ``python WORDS``: a script, ``-m MODULE`` or ``-c CODE`` and its arguments."""
        status, other_status = socket.socketpair()
        pipes = [os.pipe(), os.pipe()]
        request = [list(map(str, words)), dict(environment), str(cwd or Path.cwd())]
        data = json.dumps(request).encode("utf-8", "surrogateescape")
        descriptors = [pipes[0][1], pipes[1][1], other_status.fileno()]
        socket.send_fds(self._socket, [len(data).to_bytes(4, "little")], descriptors)
        self._socket.sendall(data)
        other_status.close()
        for _, write in pipes:
            os.close(write)
        return ForkedProcess(status, open(pipes[0][0]), open(pipes[1][0]))


_servers: list[ForkServer] = []


def start_forked(words: Sequence[object], environment: Mapping[str, str], cwd: Path | None = None) -> ForkedProcess:
    """Start ``python WORDS`` as a fork; the caller must wait for it or kill it."""
    if not _servers:
        _servers.append(ForkServer())
    return _servers[0].start(words, environment, cwd)


def run_forked(
    words: Sequence[object], environment: Mapping[str, str], cwd: Path | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` as a fork to its end."""
    process = start_forked(words, environment, cwd)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(list(map(str, words)), process.wait(), out, err)


def next_program(requests: socket.socket) -> list[str]:
    """Fork a program for each request; returns in a program, with its words. The server exits with its client."""
    while True:
        header, descriptors, _, _ = socket.recv_fds(requests, 4, 3)
        if not header:
            os._exit(0)
        words, environment, cwd = json.loads(requests.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL))
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = os.fork()
            if program == 0:
                break
            # other descriptors would keep the pipes open
            os.dup2(descriptors[2], 3)
            os.closerange(4, 1024)
            os.write(3, program.to_bytes(4, "little", signed=True))
            code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            os.write(3, code.to_bytes(4, "little", signed=True))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(descriptors[:2], 1):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    return list(words)


def run_program(words: list[str]) -> None:
    """Run a script, ``-m MODULE`` or ``-c CODE`` as ``__main__``."""
    sys.path[1:1] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if words[0] in ("-m", "-c"):
        kind, what = words[:2]
        sys.argv, sys.path[0] = [kind, *words[2:]], os.getcwd()
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


def exit_after(words: list[str]) -> NoReturn:
    """Run a program and end the process as Python does, but for the objects of modules, which it does not destroy."""
    status = 0
    try:
        run_program(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    for signal_number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(signal_number, signal.SIG_IGN)
    for name in PRELOADED:
        __import__(name)
    sys.stdout.flush()
    exit_after(next_program(socket.socket(fileno=int(sys.argv[1]))))
